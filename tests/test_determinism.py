"""The same command twice gives bit-equal losses on a CPU, compiled and on all threads; other ways to compute stay close."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_text

ROOT = Path(__file__).parent.parent
FLAGS = ["--depth=2", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=64", "--device-batch-size=8", "--total-batch-size=1024",
         "--num-iterations=20", "--warmup-steps=0", "--core-metric-every=-1", "--eval-every=0", "--sample-every=0"]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("nanochat")
    write_text(base / "text", row_group_size=100)
    run(base, "scripts.tok_train", f"--source={base / 'text'}", "--vocab-size=2000")
    return base


def run(base, module, *flags, launcher=(), **env):
    command = [sys.executable, *launcher, "-m", module, *(["--"] if launcher else []), *flags]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"), **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(base, tag, launcher=(), **env):
    run(base, "scripts.base_train", *FLAGS, f"--source={base / 'text'}", f"--model-tag={tag}", launcher=launcher, **env)
    lines = (base / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["raw_loss"] for line in lines]


@pytest.fixture(scope="module")
def compiled(base):
    return losses(base, "compiled")


def test_the_same_command_twice_is_bit_equal(base, compiled):
    assert losses(base, "again") == compiled and len(compiled) == 20


@pytest.mark.parametrize("tag,launcher,env", [
    ("eager", (), {"TORCH_COMPILE_DISABLE": "1"}),
    ("one-thread", (), {"OMP_NUM_THREADS": "1"}),
    ("two-ranks", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"), {"TORCH_COMPILE_DISABLE": "1"}),
])  # fmt: skip
def test_other_ways_to_compute_stay_close(base, compiled, tag, launcher, env):
    """Within 1e-3 over the first five steps and 0.1 over twenty: only summation order differs."""
    differences = [abs(one - other) for one, other in zip(losses(base, tag, launcher, **env), compiled, strict=True)]
    assert max(differences[:5]) < 1e-3 and max(differences) < 0.1, differences
