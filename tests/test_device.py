"""A compiler that does not work is not used."""

import os
import re
import subprocess
import sys

import pytest
from conftest import write_program
from test_gpt import make

from nanochat import device
from nanochat.device import compile_model


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
    assert run_ranks(2, lambda compute: compile_model(models[compute.rank], compute, 1) is models[compute.rank]) == [True, True]
    assert "training uncompiled and more slowly, since the compiler does not work: no space left\n" in capsys.readouterr().out
