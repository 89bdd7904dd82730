"""AdamW against `torch.optim.AdamW`, Muon against one with an exact polar factor, many ranks against one."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import optim
from nanochat.optim import MuonAdamW, muon_update


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def adamw_group(named, **changes):
    default = {"lr": 0.01, "betas": (0.8, 0.96), "eps": 1e-10, "weight_decay": 0.1}
    return {"kind": "adamw", "params": named, **default, **changes}


def muon_group(named, **changes):
    return {"kind": "muon", "params": named, "lr": 0.02, "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0, **changes}


def test_adamw_equals_torch_adamw():
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


def muon_reference(grads, momentum, beta2):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_each_muon_update_of_a_stack_is_close_to_the_reference(shape, dtype):
    grads = torch.randn(5, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads[:, 1] *= 10 ** torch.linspace(-2, 2, shape[0])[:, None]  # neither rows nor matrices may affect one another
    momentum_buffer = torch.zeros(2, *shape)
    second = torch.zeros(2, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(2, 1, shape[1])
    references = [muon_reference(grads[:, i], 0.9, 0.9) for i in range(2)]
    for grad in grads:
        updates = muon_update(grad.float(), momentum_buffer, second, 0.9, 0.9, dtype).double()
        for update, expected in zip(updates, map(next, references)):
            cosine = (update * expected).sum() / update.norm() / expected.norm()
            assert cosine > 0.98, "only the five-step approximation may differ"
            assert update.norm().item() == pytest.approx(min(shape) ** 0.5, rel=1e-4)


def test_weight_decay_is_cautious():
    """Weights decay only where the update moves them towards zero, too."""
    start, moved = parameter(16, 16), []
    for decay in (0.0, 0.5):
        p = parameter(16, 16)
        p.grad = parameter(16, 16, seed=1).detach()
        MuonAdamW([muon_group([("w", p)], weight_decay=decay, lr=0.01)]).step()
        moved.append(p)
    agree = (start - moved[0]) * start >= 0
    assert torch.allclose(moved[1], moved[0] - 0.01 * 0.5 * start * agree, atol=1e-6) and 0 < agree.sum() < 256


# -----------------------------------------------------------------------------
# Many ranks

# Neither sizes nor the number of matrices of a shape are divisible by 3
MATRICES = [(6, 4)] * 5 + [(4, 6)] * 2 + [(7, 7)]
OTHERS = {"table": (50, 7), "scalar": (1,), "line": (13,)}


def make_optimizer():
    """({name: parameter}, their optimizer)."""
    matrices = [(f"m{i}", parameter(*shape, seed=i)) for i, shape in enumerate(MATRICES)]
    others = [(name, parameter(*shape, seed=len(name))) for name, shape in OTHERS.items()]
    half = [("half", torch.nn.Parameter(parameter(9, 5).detach().bfloat16()))]
    groups = [adamw_group(others), adamw_group(half, lr=0.05), muon_group(matrices, weight_decay=0.1)]
    return dict(matrices + others + half), MuonAdamW(groups)


def gradient(name, p, step, rank):
    if name == "line" and rank == 1:
        return None  # counts as zero
    seed = step * 100 + rank * 10 + p.numel() % 7
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def run_steps(parameters, optimizer, ranks, steps=range(5)):
    """Steps with the summed gradients of `ranks`."""
    for step in steps:
        for name, p in parameters.items():
            grads = [grad for rank in ranks if (grad := gradient(name, p, step, rank)) is not None]
            p.grad = sum(grad.float() for grad in grads).to(p.dtype) if grads else None
        optimizer.step()
        optimizer.zero_grad()


def test_state_round_trip_continues_exactly_and_the_state_of_another_model_is_refused():
    (expected, optimizer), (parameters, other) = make_optimizer(), make_optimizer()
    run_steps(expected, optimizer, [0], range(3))
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    other.load_state_dict(state)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(expected[name])
    run_steps(expected, optimizer, [0], range(3, 6))
    run_steps(parameters, other, [0], range(3, 6))
    assert all(torch.equal(p, expected[name]) for name, p in parameters.items())
    for wrong in ({}, {**state, "v.momentum": torch.zeros(2)}, {**state, "m0.momentum": torch.zeros(4, 6)}):
        with pytest.raises(ValueError, match="another model"):
            other.load_state_dict(wrong)


def run_rank(rank, world_size, folder):
    """One rank: five steps with its own gradients; saves its parameters and its state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    parameters, optimizer = make_optimizer()
    run_steps(parameters, optimizer, [rank])
    torch.save({"parameters": parameters, "state": optimizer.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_many_ranks_equal_one_with_the_summed_gradients_and_share_its_state(tmp_path):
    """Chunks of 1/W of a bucket: 64 numbers more at most for AdamW, less than the largest matrix more for Muon."""
    torch.multiprocessing.spawn(run_rank, (3, str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    parameters, optimizer = make_optimizer()
    run_steps(parameters, optimizer, range(3))
    for name, p in parameters.items():
        same = [rank["parameters"][name] for rank in ranks]
        assert torch.allclose(same[0], p, rtol=0, atol=0.02 if p.dtype == torch.bfloat16 else 1e-5), name
        assert torch.equal(same[1], same[0]) and torch.equal(same[2], same[0]), "all ranks have the same"
    whole = sum(tensor.numel() for name, tensor in optimizer.state_dict().items() if not name.endswith(".step"))
    stored = [sum(x.numel() for name, x in rank["state"].items() if not name.endswith(".step")) for rank in ranks]
    assert sum(stored) == whole and max(stored) <= whole / 3 + 4 * 64 + 7 * 7


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), world_size=st.integers(1, 9))
def test_matrices_are_assigned_whole_and_evenly(sizes, world_size):
    starts, chunk = optim._assign_whole(sizes, world_size)
    taken = sorted((start, start + size) for start, size in zip(starts, sizes))
    assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:])), "no two overlap"
    assert all(start // chunk == (end - 1) // chunk < world_size for start, end in taken), "each lies in one chunk"
    assert chunk < sum(sizes) / world_size + max(sizes)


def test_large_groups_are_split_into_buckets(monkeypatch):
    monkeypatch.setattr(optim, "BUCKET", 100)
    named = [(name, torch.empty(size)) for name, size in (("a", 60), ("b", 40), ("c", 1), ("d", 500))]
    buckets = optim._buckets([*named, ("e", torch.empty(2).bfloat16())])
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a", "b"], ["c"], ["d"], ["e"]]
