"""The same command twice gives bit-equal losses on a CPU, compiled and on all threads; other ways are close."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["--depth=2", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=64", "--device-batch-size=8", "--total-batch-size=1024",
         "--num-iterations=10", "--warmup-steps=0", "--core-metric-every=-1", "--eval-every=0", "--sample-every=0"]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def losses(base, tag, launcher=(), **env):
    flags = [*FLAGS, f"--source={base}/text", f"--model-tag={tag}"]
    command = [sys.executable, *launcher, "-m", "scripts.base_train", *(["--"] if launcher else []), *flags]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"), **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (base / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["raw_loss"] for line in lines]


@pytest.fixture(scope="module")
def compiled(trained_base):
    return losses(trained_base, "compiled")


def test_the_same_command_twice_is_bit_equal(trained_base, compiled):
    assert losses(trained_base, "again") == compiled and len(compiled) == 10


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_without_the_compiler_on_one_thread_per_rank_stay_close(trained_base, compiled, ranks):
    """Within 1e-3 over the first five steps and 0.1 over ten: only the order of summation differs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
    found = losses(trained_base, f"eager{ranks}", launcher, TORCH_COMPILE_DISABLE="1", OMP_NUM_THREADS="1")
    differences = [abs(one - other) for one, other in zip(found, compiled, strict=True)]
    assert max(differences[:5]) < 1e-3 and max(differences) < 0.1, differences
