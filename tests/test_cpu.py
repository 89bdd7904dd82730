"""CPU tricks: packed products agree with plain ones and follow the weights."""

import pytest
import torch
from test_gpt import ids, make

from nanochat import cpu
from nanochat.device import prepare_for_inference


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
