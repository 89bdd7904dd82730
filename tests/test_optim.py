"""AdamW against `torch.optim.AdamW`; Muon's update against its singular values and a twin in float64."""

import pytest
import torch

from nanochat.optim import MuonAdamW, muon_update, polar_express


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def adamw_group(named, **changes):
    return {"kind": "adamw", "params": named, "lr": 0.01, "betas": (0.8, 0.96), "eps": 1e-10, "weight_decay": 0.1, **changes}


def muon_group(named, **changes):
    return {"kind": "muon", "params": named, "lr": 0.02, "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0, **changes}


def test_adamw_is_torch_adamw():
    mine, theirs = parameter(5, 7), parameter(5, 7)
    optimizer = MuonAdamW([adamw_group([("w", mine)])])
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1)
    for step in range(20):
        lr = 0.01 * (step + 1) / 20
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step(), reference.step()
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(48, 128), (128, 48), (96, 96)])
def test_polar_express_flattens_the_singular_values(shape):
    """U S V^T -> U S' V^T with the same directions and S' near 1 for every value that is not tiny."""
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    X = polar_express(G)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    in_basis = U.mT @ X.double() @ Vh.mT
    values = torch.diagonal(in_basis, dim1=-2, dim2=-1)
    big = S > 0.01 * S.amax(dim=-1, keepdim=True)
    assert values[big].min() > 0.6 and values.max() < 1.25
    off_diagonal = in_basis - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 1e-3


def muon_twin(grads, momentum, beta2):
    """The update of one matrix by its definition, with an exact polar factor in float64; yields one per gradient."""
    buffer, second = torch.zeros_like(grads[0]), None
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        G = (1 - momentum) * grad + momentum * buffer
        G = G / G.norm(dim=1, keepdim=True)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        X = U @ Vh
        across = 1 if G.size(0) >= G.size(1) else 0
        mean_square = X.square().mean(dim=across, keepdim=True)
        second = (1 - beta2) * mean_square + beta2 * (0 if second is None else second)
        X = X / second.sqrt()
        yield X * min(G.shape) ** 0.5 / X.norm()


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_muon_update_points_where_its_definition_does(shape):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(*shape, dtype=torch.float64, generator=g) for _ in range(5)]
    momentum_buffer = torch.zeros(1, *shape)
    second = torch.zeros(1, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(1, 1, shape[1])
    for grad, expected in zip(grads, muon_twin(grads, 0.9, 0.9)):
        update = muon_update(grad.float()[None], momentum_buffer, second, 0.9, 0.9)[0].double()
        cosine = (update * expected).sum() / update.norm() / expected.norm()
        assert cosine > 0.98, "only the five-step approximation may differ"
        assert update.norm().item() == pytest.approx(min(shape) ** 0.5, rel=1e-4)


def test_matrices_of_one_shape_do_not_touch_each_other():
    pair = MuonAdamW([muon_group([("a", a := parameter(8, 8, seed=1)), ("b", b := parameter(8, 8, seed=2))])])
    alone = MuonAdamW([muon_group([("b", only := parameter(8, 8, seed=2))])])
    for step in range(3):
        grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        a.grad, b.grad, only.grad = torch.ones(8, 8), grad.clone(), grad.clone()
        pair.step(), alone.step()
    assert torch.allclose(b, only, atol=1e-6)


def test_weight_decay_is_cautious():
    """Decay pulls a weight to zero only where the update moves it that way too."""
    start = parameter(16, 16).detach()
    moved = {}
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(start.clone())
        p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
        MuonAdamW([muon_group([("w", p)], weight_decay=decay, lr=0.01)]).step()
        moved[decay] = p.detach()
    update = (start - moved[0.0]) / 0.01
    agree = update * start >= 0
    expected = moved[0.0] - 0.01 * 0.5 * start * agree
    assert torch.allclose(moved[0.5], expected, atol=1e-6)
    assert agree.any() and (~agree).any()


def test_state_round_trip_continues_exactly():
    def make():
        w, e = parameter(6, 4), parameter(5, 3, seed=1)
        return w, e, MuonAdamW([muon_group([("w", w)]), adamw_group([("e", e)])])

    def go(w, e, optimizer, steps):
        for step in steps:
            g = torch.Generator().manual_seed(step)
            w.grad, e.grad = torch.randn(6, 4, generator=g), torch.randn(5, 3, generator=g)
            optimizer.step()

    w1, e1, one = make()
    go(w1, e1, one, range(6))
    w2, e2, two = make()
    go(w2, e2, two, range(3))
    w3, e3, three = make()
    w3.data.copy_(w2.data), e3.data.copy_(e2.data)
    three.load_state_dict({name: tensor.clone() for name, tensor in two.state_dict().items()})
    go(w3, e3, three, range(3, 6))
    assert torch.equal(w1, w3) and torch.equal(e1, e3)


def test_a_foreign_state_is_refused():
    _, optimizer = parameter(2, 2), MuonAdamW([muon_group([("w", parameter(2, 2))])])
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict({"v.momentum": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict({"w.momentum": torch.zeros(3, 2), "w.second_moment": torch.zeros(2, 1)})


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="neither"):
        MuonAdamW([{"kind": "sgd", "params": [], "lr": 1.0, "weight_decay": 0.0}])
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([muon_group([("v", parameter(3))])])
