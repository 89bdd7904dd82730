"""Products for inference follow the weights, leave training alone, and compute a row alone as among others."""

import copy

import pytest
import torch
from test_gpt import ids, make

from nanochat.gpt import Linear
from nanochat.inference import Product, prepare


def test_products_agree_follow_the_weights_and_leave_training_alone():
    model, fresh, idx = make(n_embd=256), make(n_embd=256), ids()
    with torch.no_grad():
        plain = model(idx)
        prepare(model)
        for part in (idx, idx[:1, :1], idx[:2, :1]):
            assert torch.allclose(model(part), plain[: len(part), : part.size(1)], atol=2e-5)
        for weight in (model.transformer.h[0].attn.c_k.weight, model.transformer.h[1].mlp.c_fc.weight):
            weight.mul_(1.5)
        fresh.load_state_dict(model.state_dict())
        changed = fresh(idx)
        assert torch.allclose(model(idx), changed, atol=5e-5) and not torch.allclose(changed, plain, atol=1e-2)
        assert torch.equal(copy.deepcopy(model)(idx), changed), "a copied model is not prepared"
        prepare(model)
        assert torch.allclose(model(idx), changed, atol=5e-5)
        packed = model.transformer.h[0].mlp.c_fc.product.packed
        assert not packed or not torch.equal(model(idx), changed), "products should be used"
    for trained in (model, fresh):
        trained(idx, idx).backward()
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in zip(model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("n_in, n_out", [(64, 192), (256, 32768), (1280, 640), (3072, 768)])
def test_a_row_of_a_product_is_the_same_alone_and_among_others(n_in, n_out):
    product, x = Product(torch.float32, Linear(n_in, n_out)), torch.randn(64, n_in)
    if not product.packed:
        pytest.skip("only oneDNN's products are so")
    with torch.no_grad():
        product.update()
        for rows in (1, 2, 3, 5, 8, 13, 16, 31):
            assert torch.equal(torch.cat([product(part) for part in x.split(rows)]), product(x))
