"""Fault injection: a job of two ranks that is killed and resumed repeatedly.

It must end with the same files, byte for byte, as one that was not. `-m slow -k "kills and 5"` takes about a minute.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanochat.checkpoint_manager import list_steps, verify

ROOT = Path(__file__).parent.parent
STEPS = 12  # at most this many per round before the kill


class Job:
    """torchrun with two ranks of a small model that saves every second step."""

    def __init__(self, base: Path, tag: str, iterations: int, resume: bool = False):
        self.directory, self.log = base / "base_checkpoints" / tag, base / f"{tag}.log"
        flags = ["--device-type=cpu", "--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=2",
                 "--total-batch-size=256", f"--num-iterations={iterations}", "--eval-every=0", "--core-metric-every=-1",
                 "--sample-every=0", "--save-every=2", "--keep-last=3", f"--source={base / 'text'}", f"--model-tag={tag}",
                 f"--resume-from-step={'latest' if resume else -1}"]  # fmt: skip
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, "-m", "scripts.base_train", "--", *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def ranks(self) -> dict:
        """{rank: process} of the running ranks."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children():
                found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):  # it has just ended or forked
            pass
        return found

    def wait_for_steps(self, count: int) -> None:
        while self.process.poll() is None and self.log.read_text().count("\nstep ") < count:
            time.sleep(0.01)
        assert self.process.poll() is None, self.log.read_text()

    def finish(self) -> None:
        assert self.process.wait(300) == 0, self.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, 60])
def test_kills_lose_nothing(trained_base, rounds):
    """SIGKILL or SIGTERM to a rank, to torchrun or to all; at start, in a step or during a save."""
    rng, tags = random.Random(0), (f"reference{rounds}", f"killed{rounds}")
    iterations = 3 * STEPS * rounds
    Job(trained_base, tags[0], iterations).finish()
    targets = ["rank 0", "rank 1", "torchrun", "all"]
    for number in range(rounds):
        before = max(list_steps(trained_base / "base_checkpoints" / tags[1]), default=0)
        job = Job(trained_base, tags[1], iterations, resume=before > 0)  # a kill may come before the first checkpoint
        if number % 6:
            job.wait_for_steps(rng.randint(1, STEPS))
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 6))  # while it starts
        target, ranks = targets[number % 4], job.ranks()
        victims = [ranks[int(target[-1])]] if target.startswith("rank") and int(target[-1]) in ranks else [psutil.Process(job.process.pid)]
        for victim in victims + (list(ranks.values()) if target == "all" else []):
            victim.send_signal(signal.SIGTERM if number % 3 == 0 else signal.SIGKILL)
        job.process.wait(90)
        deadline = time.monotonic() + 60
        while any(process.is_running() and process.status() != "zombie" for process in ranks.values()):
            assert time.monotonic() < deadline, f"round {number}: a rank outlives the job"
            time.sleep(0.1)
        steps = list_steps(job.directory)
        assert max(steps, default=0) >= before, f"round {number} lost step {before}"
        for step in steps:
            verify(job.directory, step)
    Job(trained_base, tags[1], iterations, resume=True).finish()
    folders = [trained_base / "base_checkpoints" / tag for tag in tags]
    files = [{name: file["sha256"] for name, file in verify(folder, iterations)["files"].items()} for folder in folders]
    assert files[0] == files[1]
    curves = [[(line["step"], line["raw_loss"]) for line in map(json.loads, open(folder / "metrics.jsonl"))] for folder in folders]
    assert curves[0] == curves[1]
