"""Attention against a naive float64 softmax, for every window, head grouping and cache shape; and how it is chosen.

The choice is tested on a CPU that passes for a device with kernels, some of which are wrong.
"""

import pytest
import torch

from nanochat import flash_attention
from nanochat.flash_attention import CACHE, WHOLE, flash_attn


def naive(q, k, v, left, positions):
    """Softmax in float64 over the keys that each query may see. q (T, H, D) at `positions`, k and v (S, H_kv, D)."""
    k, v = (x.double().repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    columns, positions = torch.arange(len(k)), torch.tensor(positions)[:, None]
    hidden = (columns > positions) | (columns < positions - left if left >= 0 else False)  # (T, S)
    scores = torch.einsum("thd,shd->hts", q.double(), k) / q.size(2) ** 0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def tensors(B, T, S, H, H_kv, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, heads, D, generator=g) for n, heads in ((T, H), (S, H_kv), (S, H_kv)))


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 16, 33])
@pytest.mark.parametrize("left", [-1, 0, 1, 8, 16, 100])
def test_whole_sequences_and_their_gradients(T, left, H, H_kv):
    leaves = [x.double().requires_grad_() for x in tensors(2, T, T, H, H_kv)]
    y = flash_attn.flash_attn_func(*leaves, causal=True, window_size=(left, 0))
    expected = torch.stack([naive(*row, left, range(T)) for row in zip(*leaves)])
    assert torch.allclose(y, expected, atol=1e-10)
    d_y = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, leaves, d_y, materialize_grads=True) for out in (y, expected))
    for mine, theirs in zip(*gradients):
        assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("rows, lens", [
    (None, [0, 0]), (None, [3, 3]), (None, [2, 7]),
    ([4, 5, 6, 7, 2, 0, 9], [5, 6, 390, 7, 0, 100, 1]),  # some rows of a larger cache, neighbours and not, in any order
])  # fmt: skip
@pytest.mark.parametrize("T, Q", [(1, 1), (4, 4), (5, 2)])  # new tokens, and how many of the last of them are queries
def test_with_cache(rows, lens, T, Q, left, H, H_kv):
    """Each row takes in its new keys and values at its own place and sees only its own past."""
    B, S = len(lens), max(lens) + 10
    q, k, v = tensors(B, T, T, H, H_kv, seed=1)
    _, *caches = tensors(B if rows is None else 10, 1, S, H, H_kv, seed=2)
    expected_caches = [cache.clone() for cache in caches]
    y = flash_attn.flash_attn_with_kvcache(
        q[:, -Q:], *caches, k=k, v=v, cache_seqlens=torch.tensor(lens, dtype=torch.int32),
        cache_batch_idx=None if rows is None else torch.tensor(rows, dtype=torch.int32), window_size=(left, 0),
    )  # fmt: skip
    for b, (row, n) in enumerate(zip(rows or range(B), lens)):
        for cache, new in zip(expected_caches, (k, v)):
            cache[row, n : n + T] = new[b]
        expected = naive(q[b], *(cache[row] for cache in expected_caches), left, range(n, n + T))[-Q:]
        assert torch.allclose(y[b].double(), expected, atol=1e-5)
    assert all(map(torch.equal, caches, expected_caches)), "nothing else in the cache has changed"


# -----------------------------------------------------------------------------
# The choice


def fails(*_, **__):
    raise RuntimeError("this release has no\n  window")


def attending(change=lambda y: y, window_off_by=0):
    """Exact attention with its output or its window changed."""
    return lambda q, k, v, window: change(flash_attention._blockwise(q, k, v, window + window_off_by * (window >= 0)))


def wrong_gradient(q, k, v, window):
    return flash_attention._blockwise(q, k, 1.05 * v - 0.05 * v.detach(), window)


def breaking_the_graph(q, k, v, window):
    torch._dynamo.graph_break()
    return flash_attention._blockwise(q, k, v, window)


CANDIDATES = {  # name: (kernel, beginning of the reason why it is skipped)
    "raising": (fails, "this release has no"),
    "wrong_gradient": (wrong_gradient, "a relative error of 0.05"),
    "nan": (attending(lambda y: y.where(y < 2, torch.nan)), "a relative error of nan"),
    "one_too_many": (attending(window_off_by=1), "a relative error of 0."),
    "breaking": (breaking_the_graph, ""),
    "good": (attending(), None),
    "unused": (attending(), None),
}


@pytest.fixture
def offer(monkeypatch):
    """`offer(kernels)` makes the CPU pass for a device with these kernels; returns a list of those that were loaded."""
    loaded = []

    def patch(kernels):
        loaders = {name: lambda name=name: loaded.append(name) or kernels[name] for name in kernels}
        monkeypatch.setattr(flash_attention, "candidates", lambda device, kind: loaders)
        monkeypatch.setattr(flash_attention, "_chosen", {})
        return loaded

    return patch


def choose():
    return flash_attention.choose(torch.device("cpu"), torch.bfloat16, heads=(4, 2, 16))


def bfloat16s(B=1, T=20):
    return [x.bfloat16() for x in tensors(B, T, T, 4, 2, D=16)]


def test_the_first_correct_kernel_is_chosen_once_and_one_line_says_why_no_other(offer, capsys):
    loaded = offer({name: kernel for name, (kernel, _) in CANDIDATES.items()})
    before = torch.get_rng_state()
    with torch.inference_mode():  # as an engine calls it
        assert choose() == choose() == "good"
    assert torch.equal(before, torch.get_rng_state())
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("attention: good (raising: this release has no; ")
    reasons = dict(reason.split(": ", 1) for reason in line.split("(", 1)[1].rstrip(")\n").split("; "))
    assert loaded == [*reasons, "good"] == list(CANDIDATES)[:-1]
    assert all(reason.startswith(CANDIDATES[name][1]) and reason for name, reason in reasons.items()), reasons


def test_without_a_correct_kernel_attention_is_exact(offer, capsys):
    assert choose() == "sdpa" and not capsys.readouterr().out, "on a CPU nothing is tried"
    offer({"raising": fails})
    q, k, v = bfloat16s()
    assert torch.equal(flash_attn.flash_attn_func(q, k, v), flash_attention._blockwise(q, k, v, -1))
    assert capsys.readouterr().out == "attention: sdpa (raising: this release has no)\n"


def test_an_override_is_the_only_one_tried(offer, monkeypatch):
    loaded = offer({"good": attending(), "raising": fails, "other": attending()})
    for name, found in {"other": "other", "raising": "sdpa", "sdpa": "sdpa"}.items():
        monkeypatch.setattr(flash_attention, "_override_impl", name)
        assert choose() == found
    assert loaded == ["other", "raising"]


def test_the_choice_must_be_made_before_compiling(offer):
    loaded = offer({"good": attending()})
    compiled = torch.compile(flash_attn.flash_attn_func, backend="eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match="before compiling"):
        compiled(*bfloat16s())
    assert not loaded and choose() == "good"
    assert torch.equal(compiled(*bfloat16s()), flash_attn.flash_attn_func(*bfloat16s()))


def without_window(*inputs, **arguments):
    return flash_attention._cached(*inputs, **{**arguments, "window_size": (-1, -1)})


def writing_elsewhere(q, k_cache, *rest, **arguments):
    return flash_attention._cached(q, k_cache.clone(), *rest, **arguments)


@pytest.mark.parametrize("kernel, line", [
    (flash_attention._cached, "fa3"),
    (without_window, "sdpa (fa3: a relative error of"),
    (writing_elsewhere, "sdpa (fa3: a relative error of"),
])  # fmt: skip
def test_a_kernel_for_the_cache_is_tried_too(offer, capsys, kernel, line):
    offer({"fa3": kernel})
    q, k, v = bfloat16s(B=2, T=1)
    caches = [torch.zeros(2, 20, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    lens = torch.tensor([0, 0], dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=lens, window_size=(3, 0))
    assert capsys.readouterr().out.startswith(f"attention to a cache: {line}")
    assert torch.allclose(y, v.repeat_interleave(2, dim=2)), "of one token alone: its own value"


@pytest.mark.parametrize("window", [-1, 5])
def test_the_installed_torch_has_the_aten_kernel_with_our_arguments(window):
    """On the meta device, where arguments are bound and shapes are computed, forward and backward."""
    leaves = [x.to("meta").requires_grad_() for x in bfloat16s()]
    y = flash_attention.aten(*leaves, window)
    y.sum().backward()
    assert y.shape == leaves[0].shape and [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_flash_attention_3_is_tried_first_on_a_gpu_and_refused_without_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    for kind, names in {WHOLE: ["fa3", "aten"], CACHE: ["fa3", "triton"]}.items():
        kernels = flash_attention.candidates(torch.device("cuda:0"), kind)
        assert list(kernels) == names
        with pytest.raises(RuntimeError, match="needs a Hopper GPU"):
            kernels["fa3"]()
