"""Attention against a naive float64 softmax, for every window, head grouping and cache shape."""

import pytest
import torch

from nanochat import flash_attention
from nanochat.flash_attention import flash_attn


@pytest.fixture(autouse=True)
def sdpa_only(monkeypatch):
    monkeypatch.setattr(flash_attention, "_override_impl", "sdpa")


def naive(q, k, v, left, q_positions):
    """One query at a time in float64: softmax over the keys it may see. q (T, H, D), k and v (S, H_kv, D)."""
    T, H, D = q.shape
    group = H // k.size(1)
    out = torch.zeros(T, H, D, dtype=torch.float64)
    for t in range(T):
        p = q_positions[t]
        first = 0 if left < 0 else max(0, p - left)
        for h in range(H):
            keys, values = k[first : p + 1, h // group].double(), v[first : p + 1, h // group].double()
            out[t, h] = torch.softmax(keys @ q[t, h].double() / D**0.5, dim=0) @ values
    return out


def tensors(B, T, S, H, H_kv, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, heads, D, generator=g) for n, heads in ((T, H), (S, H_kv), (S, H_kv)))


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 7, 16, 33])
@pytest.mark.parametrize("left", [-1, 0, 1, 4, 8, 16, 32, 100])
def test_whole_sequences(T, left, H, H_kv):
    q, k, v = tensors(2, T, T, H, H_kv)
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    for b in range(2):
        assert torch.allclose(y[b].double(), naive(q[b], k[b], v[b], left, range(T)), atol=1e-5)


@pytest.mark.parametrize("left", [-1, 4, 5])
def test_gradients_of_windows(left):
    """The blockwise gradient equals that of one softmax under a band mask, written out."""
    T, D = 19, 8
    q, k, v = (x.double().requires_grad_() for x in tensors(2, T, T, 4, 2, D))
    weight = torch.randn(2, T, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (flash_attn.flash_attn_func(q, k, v, window_size=(left, 0)) * weight).sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    i = torch.arange(T)
    seen = i[None, :] <= i[:, None]
    if left >= 0:
        seen &= i[None, :] >= i[:, None] - left
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / D**0.5
    probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshd->bthd", probs, v.repeat_interleave(2, dim=2))
    (y * weight).sum().backward()
    for mine, x in zip(got, (q, k, v)):
        assert torch.allclose(mine, x.grad, atol=1e-10)


@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("seqlens,T", [((0, 0), 5), ((3, 3), 1), ((0, 6), 1), ((2, 7), 4)])
def test_with_cache(seqlens, T, left, H, H_kv):
    """Rows of different lengths: each takes in its new keys at its own place and sees only its own past."""
    S = 12
    q, k_new, v_new = tensors(2, T, T, H, H_kv, seed=1)
    _, k_cache, v_cache = tensors(2, 1, S, H, H_kv, seed=2)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    lens = torch.tensor(seqlens, dtype=torch.int32)
    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k_new, v=v_new, cache_seqlens=lens, causal=True, window_size=(left, 0)
    )
    for b, n in enumerate(seqlens):
        for cache, before, new in ((k_cache, before_k, k_new), (v_cache, before_v, v_new)):
            assert torch.equal(cache[b, n : n + T], new[b])
            assert torch.equal(cache[b, :n], before[b, :n]) and torch.equal(cache[b, n + T :], before[b, n + T :])
        expected = naive(q[b], k_cache[b], v_cache[b], left, range(n, n + T))
        assert torch.allclose(y[b].double(), expected, atol=1e-5)


@pytest.mark.parametrize("left", [-1, 0, 3, 50])
@pytest.mark.parametrize("T", [1, 3])
def test_with_some_rows_of_a_larger_cache(T, left):
    """Neighbours and loners, long and short, in any order; the rows that are not named stay as they are."""
    g = torch.Generator().manual_seed(3)
    S, rows, lens = 400, [4, 5, 6, 7, 2, 0, 9], [5, 6, 390, 7, 0, 100, 1]
    q, k_new, v_new = tensors(len(rows), T, T, 4, 2, seed=4)
    k_cache, v_cache = (torch.randn(10, S, 2, 8, generator=g) for _ in range(2))
    before = k_cache.clone()
    y = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k_new, v=v_new, cache_seqlens=torch.tensor(lens, dtype=torch.int32),
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32), causal=True, window_size=(left, 0),
    )  # fmt: skip
    for b, (row, n) in enumerate(zip(rows, lens)):
        before[row, n : n + T] = k_new[b]
        assert torch.allclose(y[b].double(), naive(q[b], k_cache[row], v_cache[row], left, range(n, n + T)), atol=1e-5)
    assert torch.equal(k_cache, before)


def test_queries_of_the_last_new_tokens_only():
    q, k_new, v_new = tensors(2, 2, 5, 4, 2, seed=5)
    caches = [torch.zeros(2, 20, 2, 8) for _ in range(4)]
    lens = torch.tensor([3, 9], dtype=torch.int32)
    five = torch.cat([torch.zeros(2, 3, 4, 8), q], dim=1)
    some = flash_attn.flash_attn_with_kvcache(q, *caches[:2], k=k_new, v=v_new, cache_seqlens=lens, window_size=(4, 0))
    every = flash_attn.flash_attn_with_kvcache(five, *caches[2:], k=k_new, v=v_new, cache_seqlens=lens, window_size=(4, 0))
    assert torch.allclose(some, every[:, 3:], atol=1e-6) and torch.equal(caches[0], caches[2])
