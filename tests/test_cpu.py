"""CPU tricks: packed products agree with plain ones and follow the weights. A compiler that does not work is not used."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import write_program
from test_gpt import ids, make

from nanochat import cpu, device
from nanochat.device import compile_model, prepare_for_inference


def test_packed_products_equal_plain_ones_and_are_not_used_once_stale():
    """Also for one and two tokens, where the product is padded; with gradients they are not used at all."""
    model = make(n_embd=256, n_head=4, vocab_size=257)
    idx = ids(vocab=257)
    with torch.no_grad():
        plain = model(idx)
    assert prepare_for_inference(model) is model
    if not isinstance(model.lm_head, cpu.PackedLinear):
        pytest.skip("this processor has no packed products")
    with torch.no_grad():
        for part in (idx, idx[:1, :1], idx[:2, :1]):
            packed = model(part)
            assert torch.allclose(packed, plain[: len(part), : part.size(1)], atol=2e-5)
        assert not torch.equal(model(idx), plain), "the packed product should have been used"
        block = model.transformer.h[0]
        block.attn.c_k.weight.mul_(1.5)
        block.mlp.c_fc.weight.mul_(0.5)
        model.lm_head.weight.mul_(2.0)
        changed = model(idx)
    fresh = make(n_embd=256, n_head=4, vocab_size=257)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(changed, fresh(idx), atol=5e-5) and not torch.allclose(changed, plain, atol=1e-2)
    prepare_for_inference(model)
    model(idx, idx).backward()
    fresh(idx, idx).backward()
    for mine, theirs in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(mine.grad, theirs.grad)


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
