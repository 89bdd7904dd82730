"""A compiler that does not work is not used; micro-batches fit into a GPU's memory."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import write_program
from test_gpt import make

from nanochat import device
from nanochat.common import Compute, UserError
from nanochat.device import compile_model, fit_device_batch
from nanochat.gpt import GPT, config_of_depth


@pytest.mark.parametrize("cache, reason", [
    ("new", "^cannot find as"), ("file", "UserError: PyTorch cannot create its cache: .*/file'; set TORCHINDUCTOR_CACHE_DIR"),
])  # fmt: skip
def test_the_reason_why_nothing_can_be_compiled_is_one_line(tmp_path, cache, reason):
    """A compiler that starts but fails; a cache folder that is a file. In a process of its own, since PyTorch remembers them."""
    (tmp_path / "file").touch()
    for name in ("g++", "clang++"):
        write_program(tmp_path / "programs" / name, 'case "$*" in *--version*) echo 13 ;; *) echo "cannot find as" >&2; exit 1 ;; esac')
    code = "import torch; from nanochat.device import compiler_fault; print(compiler_fault(torch.device('cpu')))"
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "0", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache),
           "PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}"}  # fmt: skip
    env.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert re.search(reason, (done.stdout or done.stderr).splitlines()[-1]) and done.stdout.count("\n") <= 1, done.stdout + done.stderr


def test_all_ranks_train_uncompiled_where_the_compiler_of_one_does_not_work(run_ranks, monkeypatch, capsys):
    faults, models = iter([None, "no space left"]), [make(), make()]
    monkeypatch.setattr(device, "compiler_fault", lambda _: next(faults))
    assert run_ranks(2, lambda compute: compile_model(models[compute.rank], compute) is models[compute.rank]) == [True, True]
    assert "training uncompiled and more slowly, since the compiler does not work: no space left\n" in capsys.readouterr().out


@pytest.mark.parametrize("depth, free, rows", [(20, 81e9, 32), (24, 80e9, 16), (24, 143e9, 32), (12, 22e9, 16), (12, 4e9, 0)])
def test_micro_batches_are_the_largest_that_fit(monkeypatch, depth, free, rows):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), None))
    with torch.device("meta"):
        model = GPT(config_of_depth(depth, 49152, 2048)).bfloat16()
    compute = Compute(torch.device("cuda"), torch.bfloat16)
    if rows:
        assert fit_device_batch(model, compute, 2**19) == rows
    else:
        with pytest.raises(UserError, match="^one row takes 5.8 GB and 3.8 GB of this GPU's memory are free; use a smaller"):
            fit_device_batch(model, compute, 2**19)
