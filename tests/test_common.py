"""How a job of several ranks fails (real torchrun jobs in which rank 1 fails), and errors and folders of one process."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch

from nanochat.common import UserError, atomic, compute_init, get_base_dir, run_script

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import os, signal, sys, time
import torch
from nanochat import common

case = sys.argv[1]

def fail(compute):
    if case == "user error of all":
        raise common.UserError("--depth must be positive")
    if compute.rank == 1:
        if case == "raise":
            raise KeyError("own error")
        if case == "user error of one":
            raise common.UserError("no such file on this node")
        if case in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), signal.Signals[case])
        if case == "hang":
            hang_here()

def hang_here():
    time.sleep(1000)

def main():
    print(f"pid {os.getpid()}\\n", end="", flush=True)
    if case == "starting":
        hang_here()
    compute = common.compute_init("cpu")
    print(f"training on {torch.get_num_threads()} threads\\n", end="", flush=True)
    for step in range(10**6):
        compute.sum(torch.ones(1))
        if step == 2:
            fail(compute)
        compute.heartbeat()
        time.sleep(0.05)

if __name__ == "__main__":
    common.run_script(main)
"""


class Job:
    """A torchrun of two ranks."""

    def __init__(self, tmp_path, case, **variables):
        (tmp_path / "worker.py").write_text(WORKER)
        self.log = tmp_path / "log"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(tmp_path / "base"), **variables}
        env.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py", case]
        with open(self.log, "w") as log:
            self.torchrun = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)

    def running(self) -> list[int]:
        """The ranks that run."""
        pids = map(int, re.findall(r"^pid (\d+)$", self.log.read_text(), re.M))
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def end(self) -> str:
        """The job's output. It must end by itself, with all its processes."""
        try:
            self.torchrun.wait(90)
            limit = time.monotonic() + 10
            while self.running():
                assert time.monotonic() < limit, self.log.read_text()
                time.sleep(0.1)
        finally:
            self.torchrun.kill()
            for pid in self.running():
                os.kill(pid, signal.SIGKILL)
        return self.log.read_text()


# -----------------------------------------------------------------------------
# Several ranks

CAUSE = "Root Cause .first observed failure.:.*rank      : 1 .*"  # torchrun's report on the rank that failed first


@pytest.mark.parametrize(
    "case, variables, report",
    [
        ("raise", {}, CAUSE + "KeyError: 'own error'"),
        ("user error of all", {}, "^error: --depth must be positive$"),
        pytest.param("user error of one", {}, "^rank 1: error: no such file on this node$.*" + CAUSE, marks=pytest.mark.slow),
        pytest.param("SIGKILL", {}, CAUSE + "SIGKILL", marks=pytest.mark.slow),
        ("hang", {"NANOCHAT_HANG_TIMEOUT": "3"}, "Timeout.*in hang_here"),
        # A stopped process cannot time out itself; the rank that waits for it does
        pytest.param("SIGSTOP", {"NANOCHAT_HANG_TIMEOUT": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}, "Timeout",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_failing_rank_ends_the_job_which_reports_why(tmp_path, case, variables, report):
    job = Job(tmp_path, case, **variables)
    output = job.end()
    assert job.torchrun.returncode == 1 and re.search(report, output, re.M | re.S), output
    assert len(re.findall("^error: ", output, re.M)) == (case == "user error of all"), "one rank prints it"


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_no_rank_outlives_torchrun(tmp_path, moment):
    job = Job(tmp_path, moment)
    while job.log.read_text().count("pid" if moment == "starting" else "training") < 2 and job.torchrun.poll() is None:
        time.sleep(0.1)
    job.torchrun.kill()
    output = job.end()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert moment == "starting" or output.count(f"training on {threads} threads") == 2, "the ranks share the cores"


def test_on_main_and_main_first_raise_everywhere(run_ranks):
    def work(compute):
        order = []

        def fail():
            raise UserError(f"on rank {compute.rank}")

        assert compute.on_main(lambda: order.append(compute.rank) or "result") == "result"
        assert compute.main_first(lambda: order.append(compute.rank) or compute.rank) == compute.rank
        for call in (compute.on_main, compute.main_first):
            with pytest.raises(UserError, match="on rank 0"):
                call(fail)
        return order

    assert run_ranks(3, work) == [[0, 0], [1], [2]]


# -----------------------------------------------------------------------------
# One process


def test_ranks_without_torchrun_or_a_gpu_are_refused(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="WORLD_SIZE is 2 .* torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        compute_init("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match="local rank 5 has no GPU: there are 4; .*--nproc-per-node=4"):
        compute_init("cuda")


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("what to do"), "error: what to do"),
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
         "error: [Errno 28] No space left on device: 'model.safetensors'; free some space, or set NANOCHAT_BASE_DIR"),
        (KeyboardInterrupt(), "130"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_and_ctrl_c_exits_with_130(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert str(exit.value.code).startswith(code)
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)  # a fault of the program keeps its traceback


def test_a_reader_that_closes_our_output_is_no_error():
    code = "from nanochat.common import *; run_script(lambda: [print0('line') for _ in range(10**6)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


def test_the_base_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/x")
    assert get_base_dir() == tmp_path / "x" and (tmp_path / "x").is_dir()
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300), "~nobody.of.that.name/x"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(wrong))
        with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
            get_base_dir()


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_writes_a_file_or_folder_completely_or_not_at_all(tmp_path, folder):
    target = tmp_path / "a" / "b"
    for error in (KeyboardInterrupt, None):
        with pytest.raises(error) if error else nullcontext(), atomic(target) as tmp:
            if folder:
                tmp.mkdir()
            (tmp / "file" if folder else tmp).write_text("text")
            if error:
                raise error
        assert list((tmp_path / "a").iterdir()) == ([] if error else [target]), "no temporary files are left"
    assert (target / "file" if folder else target).read_text() == "text"


def test_atomic_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic(tmp_path / "a") as tmp:
        tmp.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_wandb_without_a_login_is_a_user_error(tmp_path):
    """In a process of its own, since the library reads its settings once."""
    code = "from nanochat.common import *; run_script(lambda: check_wandb('name'))"
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and re.match("error: --run=name needs a login to wandb: .*wandb login.*WANDB_MODE=offline", line)
