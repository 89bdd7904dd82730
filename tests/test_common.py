"""How many ranks fail: real torchrun jobs of two ranks, in which something happens to rank 1.

Whatever happens, the job ends by itself, its last words are that rank's own error, and no process is left.
Most jobs run with shorter periods than the real ones, which are tried in a slow test.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import common
from nanochat.common import UserError, compute_init, restarts, run_script

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import os, signal, sys, time
import torch
from nanochat import common
from nanochat.common import UserError

what, common.PERIOD, common.PATIENCE, common.GRACE = sys.argv[1], *map(float, sys.argv[2:])

def turn_endlessly():
    while True:
        pass

def happen(compute):
    if what == "user error of all":
        raise UserError("--depth must be positive")
    if compute.rank != 1:
        return
    if what == "raise":
        raise KeyError("own error")
    if what == "user error of one":
        raise UserError("no such file on this node")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze" and common.restarts() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "turn":
        turn_endlessly()
    if what == "sleep":
        time.sleep(1000)

def main():
    if what == "apart":
        os.environ["NANOCHAT_BASE_DIR"] += os.environ["RANK"]
    compute = common.compute_init("cpu")
    print(f"pid {os.getpid()} threads {torch.get_num_threads()}\\n", end="", flush=True)
    for step in range(10**6 if what == "launcher" else 5):
        total = compute.sum(torch.ones(1))
        if step == 2:
            happen(compute)
        compute.pulse.armed = True
        time.sleep(0.05)
    common.print0(f"sum {total.item()} restarts {common.restarts()}")
    common.compute_cleanup(compute)

if __name__ == "__main__":
    common.run_script(main)
"""


class Job:
    """A torchrun of two ranks; `end` waits for it and tells what was seen."""

    def __init__(self, tmp_path, what, *options, periods=(0.3, 3, 3)):
        (tmp_path / "worker.py").write_text(WORKER)
        self.log = tmp_path / "log"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env["NANOCHAT_BASE_DIR"] = str(tmp_path / "base")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        command += [str(tmp_path / "worker.py"), what, *map(str, periods)]
        with open(self.log, "w") as log:
            self.torchrun = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"^pid (\d+) ", self.output, re.M)]

    def end(self, seconds=60) -> str:
        """The job's output. It must end by itself, with all its processes."""
        try:
            self.torchrun.wait(seconds)
            limit = time.monotonic() + 10
            while (left := [pid for pid in self.pids if is_alive(pid)]) and time.monotonic() < limit:
                time.sleep(0.1)
            assert not left, self.output
        finally:
            self.torchrun.kill()
            for pid in filter(is_alive, self.pids):
                os.kill(pid, signal.SIGKILL)
        return self.output

    def root_cause(self, seconds=60) -> str:
        """The last words of a job that failed."""
        output = self.end(seconds)
        assert self.torchrun.returncode == 1, output
        return output.split("Root Cause (first observed failure):")[1]


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


# -----------------------------------------------------------------------------
# A rank fails


def test_an_exception_of_one_rank_is_the_last_thing_shown(tmp_path):
    job = Job(tmp_path, "raise")
    cause = job.root_cause()
    assert "rank      : 1" in cause and "KeyError: 'own error'" in cause and "in happen" in cause
    assert job.output.count("Traceback") <= 3  # rank 1's, in its own words and in torchrun's, and torchrun's own


@pytest.mark.slow
def test_a_users_mistake_on_one_rank_is_one_line(tmp_path):
    job = Job(tmp_path, "user error of one")
    cause = job.root_cause()
    assert "rank      : 1" in cause and "traceback : error: no such file on this node" in cause
    assert "rank 1: error: no such file on this node\n" in job.output


@pytest.mark.slow
def test_a_users_mistake_on_all_ranks_is_told_once(tmp_path):
    job = Job(tmp_path, "user error of all")
    assert "traceback : error: --depth must be positive" in job.root_cause()
    assert len(re.findall(r"^error: --depth must be positive$", job.output, re.M)) == 1
    assert "rank 1: error" not in job.output


@pytest.mark.slow
def test_a_killed_rank(tmp_path):
    job = Job(tmp_path, "kill")
    cause = job.root_cause()
    assert "rank      : 1" in cause and "SIGKILL" in cause


@pytest.mark.slow
def test_ranks_that_do_not_share_the_base_folder(tmp_path):
    cause = Job(tmp_path, "apart").root_cause()
    assert "must be one folder that all nodes share" in cause and str(tmp_path / "base") in cause


# -----------------------------------------------------------------------------
# A rank stands still


def test_a_frozen_rank_is_killed_and_restarted_ranks_meet_again(tmp_path):
    """The new ranks find the store of the former ones and must not take what stands there for each other's."""
    job = Job(tmp_path, "freeze", "--max-restarts=1")
    output = job.end()
    assert job.torchrun.returncode == 0, output
    assert re.search(r"^error: rank 1 \(pid \d+ on .*\) has not answered for \d+ s", output, re.M)
    assert "sum 2.0 restarts 1" in output
    assert f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}" in output
    assert not list((tmp_path / "base").iterdir())  # what tried the base folder is removed again


@pytest.mark.parametrize(
    "what, where",
    [("sleep", "in happen"), pytest.param("turn", "in turn_endlessly", marks=pytest.mark.slow)],
)
def test_a_rank_that_hangs_shows_where(tmp_path, what, where):
    cause = Job(tmp_path, what).root_cause()
    assert "rank      : 1" in cause
    assert re.search(rf"error: rank 1 hangs: nothing got done for \d+ s; it is at .*worker.py:\d+ {where}", cause)


def test_no_rank_outlives_torchrun(tmp_path):
    job = Job(tmp_path, "launcher")
    while len(job.pids) < 2 and job.torchrun.poll() is None:
        time.sleep(0.1)
    job.torchrun.kill()
    assert "because torchrun, which started it, is gone" in job.end()


@pytest.mark.slow
@pytest.mark.parametrize("what, words", [("freeze", "has not answered for 2"), ("sleep", "nothing got done for 2")])
def test_at_the_real_periods_a_minute_is_enough(tmp_path, what, words):
    periods = (common.PERIOD, common.PATIENCE, common.GRACE)
    cause = Job(tmp_path, what, periods=periods).root_cause(60)
    assert "rank      : 1" in cause and "error: rank 1 " in cause and words in cause


# -----------------------------------------------------------------------------
# The watch, shown what never happened


def looks_until_a_hang(monkeypatch, **shown) -> int:
    """How many looks it takes until two ranks that get nothing done are taken to hang."""
    looks, ended = 0, []
    watch = common.Watch(None, common.Pulse(), rank=0, world_size=2)
    monkeypatch.setattr(watch, "_end_hang", ended.append)
    while not ended and looks < 100:
        looks += 1
        sign = {"tick": looks, **vars(common.Pulse()), "armed": True}
        watch._look([sign, {**sign, **shown}])
    return looks


def test_who_has_slow_steps_is_given_more_time(monkeypatch):
    assert looks_until_a_hang(monkeypatch) == common.PATIENCE / common.PERIOD
    assert looks_until_a_hang(monkeypatch, patience=90.0) == 90 / common.PERIOD
    assert looks_until_a_hang(monkeypatch, armed=False) == 100


@pytest.mark.parametrize("failures, lost", [(9, False), (10, True)])
def test_a_store_that_fails_now_and_then_is_not_lost(monkeypatch, failures, lost):
    watch, words = common.Watch(None, common.Pulse(), rank=0, world_size=1), []

    def stop(what):
        words.append(what)
        watch.over.set()

    monkeypatch.setattr(common, "_leave", stop)
    monkeypatch.setattr(watch, "_look", stop)
    for signs in [[]] * failures + [["a sign"]]:
        watch.news.put(signs)
    watch._listen()
    assert ("torchrun" in words[0]) == lost


# -----------------------------------------------------------------------------
# One process


def test_world_size_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 .* torchrun"):
        compute_init("cpu")


def test_restarts(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert restarts() == 3


def test_a_rank_without_a_gpu_of_its_own(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match="local rank 5 .* has 4; .*--nproc-per-node=4"):
        compute_init("cuda")


def test_alone_a_fault_of_the_program_keeps_its_traceback_and_a_mistake_is_one_line():
    def mistake():
        raise UserError("what to do")

    with pytest.raises(SystemExit, match="^error: what to do$"):
        run_script(mistake)
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_the_first_error_of_a_rank_stays(tmp_path):
    """In the layout that torch.distributed.elastic's own error handler writes."""
    file = tmp_path / "error.json"
    common._record_error("Traceback\nKeyError: 1", str(file))
    common._record_error("a later one", str(file))
    common._record_error("where nothing can be written", str(tmp_path / "no folder" / "error.json"))
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "KeyError: 1" and message["extraInfo"]["py_callstack"] == "Traceback\nKeyError: 1"


ONE = common.Compute(device=None, dtype=None)


def test_a_base_folder_that_can_only_be_read_is_not_tried(monkeypatch):
    def refuse(number):
        def get_base_dir():
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(common, "get_base_dir", get_base_dir)

    for number in (errno.EROFS, errno.EACCES):
        refuse(number)
        common._check_base_dir_is_shared(ONE, "start")
    refuse(errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        common._check_base_dir_is_shared(ONE, "start")


def test_what_tries_the_base_folder_is_removed_even_then(base_dir, monkeypatch):
    def exists(path):
        assert list(base_dir.iterdir()) == [path]
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists)
        with pytest.raises(OSError, match="Stale"):
            common._check_base_dir_is_shared(ONE, "start")
    assert list(base_dir.iterdir()) == []


def test_a_rank_leaves_with_1_even_where_nobody_reads_its_words(tmp_path):
    code = "from nanochat import common; import sys; sys.stderr.close(); common._leave('error: own')"
    file = tmp_path / "error.json"
    env = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(file)}
    assert subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT).returncode == 1
    assert "error: own" in file.read_text()
