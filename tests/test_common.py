"""How a job of several ranks fails (real torchrun jobs in which rank 1 fails), and errors and folders of one process."""

import errno
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import ROOT
from tiny import CPU

from nanochat import common
from nanochat.common import UserError, atomic, base_dir_path, compute_init, get_base_dir, run_script

WORKER = """
import os, signal, sys, time
import torch
from nanochat.common import UserError, compute_init, run_script

def hang_here():
    time.sleep(1000)

def main():
    compute = compute_init("cpu")
    print(f"training on {torch.get_num_threads()} threads\\n", end="", flush=True)
    for step in range(10**6):
        compute.sum(torch.ones(1))
        if step == 2:
            exec(sys.argv[1])
        compute.heartbeat()
        time.sleep(0.05)

run_script(main)
"""


def start_job(tmp_path, at_step_2, **variables):
    """A torchrun of two ranks, which run a line of code at step 2. Its output ends when the last of its processes does."""
    (tmp_path / "worker.py").write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(tmp_path / "base"), **variables}
    env.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py", at_step_2]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, text=True)


# -----------------------------------------------------------------------------
# Several ranks

CAUSE = "Root Cause .first observed failure.:.*rank      : 1 .*"  # torchrun's report on the rank that failed first
SOON = {"NANOCHAT_HANG_TIMEOUT": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}


@pytest.mark.parametrize("failure, variables, report", [
    ("assert compute.rank == 0, 'own error'", {}, CAUSE + "AssertionError: own error"),
    ("raise UserError('--depth must be positive')", {}, "^error: --depth must be positive$"),
    ("if compute.rank == 1: hang_here()", SOON, "Timeout.*in hang_here"),
    pytest.param("if compute.rank == 1: raise UserError('no such file on this node')", {},
                 "^rank 1: error: no such file on this node$.*" + CAUSE, marks=pytest.mark.slow),
    pytest.param("if compute.rank == 1: os.kill(os.getpid(), signal.SIGKILL)", {}, CAUSE + "SIGKILL", marks=pytest.mark.slow),
    # A stopped process cannot time out itself; the rank that waits for it does
    pytest.param("if compute.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)", SOON, "Timeout", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_failing_rank_ends_the_job_which_reports_why(tmp_path, failure, variables, report):
    job = start_job(tmp_path, failure, **variables)
    output = job.communicate(timeout=90)[0]
    assert job.returncode == 1 and re.search(report, output, re.M | re.S), output
    assert len(re.findall("^error: ", output, re.M)) == report.startswith("^error"), "one rank prints it"


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_ranks_share_the_cores_and_none_outlives_torchrun(tmp_path):
    job = start_job(tmp_path, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    started = list(islice((line for line in job.stdout if line.startswith("training")), 2))
    assert started == [f"training on {threads} threads\n"] * 2
    job.kill()
    job.communicate(timeout=60)


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


def test_ranks_without_torchrun_a_gpu_or_a_time_out_are_refused(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="WORLD_SIZE is 2 .* torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        compute_init("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("NANOCHAT_HANG_TIMEOUT", "0")
    with pytest.raises(UserError, match="NANOCHAT_HANG_TIMEOUT=0 is not"):
        replace(CPU, world_size=2).heartbeat()
    with pytest.raises(UserError, match="local rank 5 has no GPU: there are 4; .*--nproc-per-node=4"):
        compute_init("cuda")


def test_a_cpu_that_is_fast_at_bfloat16_trains_in_it(monkeypatch):
    for fast, override, training in [(True, "", "bfloat16"), (False, "", "float32"), (True, "float32", "float32")]:
        monkeypatch.setattr(common, "fast_bfloat16", lambda: fast)
        monkeypatch.setenv("NANOCHAT_DTYPE", override)
        assert str(compute_init("cpu", training=True).dtype) == f"torch.{training}"
        assert compute_init("cpu").dtype == torch.float32, "replies do not depend on the batch"


@pytest.mark.parametrize("error, code", [
    (UserError("what to do"), "error: what to do"),
    (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
     "error: [Errno 28] No space left on device: 'model.safetensors'; free some space, or set NANOCHAT_BASE_DIR"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/tmp/torchinductor_me"),
     "error: [Errno 20] Not a directory: '/tmp/torchinductor_me'; set TORCHINDUCTOR_CACHE_DIR"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "error: not enough memory (CUDA out"),
    (MemoryError(), "error: not enough memory"),
    (KeyboardInterrupt(), "130"),
])  # fmt: skip
def test_user_errors_are_one_line_and_ctrl_c_exits_with_130(error, code, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

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
    deep = "/x" * 1950  # with the names of our files it would be longer than Linux permits
    for wrong in (tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300), deep, "a\nb", "~nobody.of.that.name/x"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(wrong))
        with pytest.raises(UserError, match="NANOCHAT_BASE_DIR=.*; set it to a writable folder"):
            base_dir_path()


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_writes_a_file_or_folder_completely_or_not_at_all(tmp_path, folder):
    target = tmp_path / "a" / "b"
    for error in (KeyboardInterrupt, None):
        with pytest.raises(error) if error else nullcontext(), atomic(target) as tmp:
            if folder:
                tmp.mkdir()
            (tmp / "file" if folder else tmp).write_text("text")
            assert not target.exists()
            if error:
                raise error
        assert list((tmp_path / "a").iterdir()) == ([] if error else [target]), "no temporary files are left"
    assert (target / "file" if folder else target).read_text() == "text"


@pytest.mark.parametrize("mode, key", [("online", ""), ("online", "too-short"), ("invalid", "")])
def test_wandb_without_a_login_is_a_user_error(tmp_path, mode, key):
    """In a process of its own, since the library reads its settings once."""
    code = "from nanochat.common import *; run_script(lambda: check_wandb('name'))"
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_MODE": mode, "WANDB_API_KEY": key}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and re.match("error: --run=name needs a login to wandb.*: run `wandb login`, set WANDB_MODE=offline", line)
