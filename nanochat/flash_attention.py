"""Attention behind one name: `flash_attn.flash_attn_func` and `flash_attn.flash_attn_with_kvcache`.

The layout and the arguments are Flash Attention's: tensors are (B, T, H, D), keys and
values may have fewer heads than queries (grouped-query attention), and `window_size` is
`(left, 0)`: a query sees `left` tokens before itself and itself; -1 means no limit.

Flash Attention 3 is used on Hopper where it is installed. Everywhere else PyTorch's own
`scaled_dot_product_attention` does the work, and a window is still not paid in full:
queries are cut into blocks of the window's length, and each block attends to its own
keys and those of the block before. That is exact and costs O(T * window).
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F

HAS_FA3 = find_spec("flash_attn_interface") is not None  # installed; whether it suits the chip is asked at the call
_override_impl = None  # tests set "fa3" or "sdpa"


def _use_fa3(q: torch.Tensor) -> bool:
    if _override_impl is not None:
        return _override_impl == "fa3"
    return HAS_FA3 and q.is_cuda and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device)[0] == 9


def _sdpa(q, k, v, mask=None, causal=False):
    """PyTorch's attention on (B, H, T, D), with each key head shared by a group of query heads."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def _band_mask(window: int, device: torch.device) -> torch.Tensor:
    """Which of the 2w keys of (previous block, own block) the w queries of a block see: (w, 2w) bool.

    Query r stands at key column w + r and sees columns r .. w + r, e.g. for w = 2:
        1 1 1 0
        0 1 1 1
    """
    r = torch.arange(window, device=device)[:, None]
    c = torch.arange(2 * window, device=device)[None, :]
    return (c >= r) & (c <= r + window)


def _windowed(q, k, v, window: int):
    """Causal attention where each query sees `window` tokens before itself; (B, H, T, D) in and out."""
    B, H, T, D = q.shape
    blocks = -(-T // window)
    pad = blocks * window - T
    if pad:  # keys that are padded stand after every real query, so no real query sees them
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    first = _sdpa(*(x[:, :, :window] for x in (q, k, v)), causal=True)  # (B, H, w, D)

    def fold(x):  # (B, H, blocks - 1, w', D) -> (B * (blocks - 1), H, w', D)
        return x.transpose(1, 2).flatten(0, 1)

    def with_previous(x):  # keys of each later block, its predecessor's in front
        x = x.unflatten(2, (blocks, window))
        return fold(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3))

    later = fold(q[:, :, window:].unflatten(2, (blocks - 1, window)))
    later = _sdpa(later, with_previous(k), with_previous(v), mask=_band_mask(window, q.device))
    later = later.unflatten(0, (B, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, later], dim=2)[:, :, :T]


def flash_attn_func(q, k, v, causal=True, window_size=(-1, -1)):
    """Self-attention over whole sequences.

    q (B, T, H, D); k, v (B, T, H_kv, D) with H_kv dividing H; returns (B, T, H, D).
    """
    assert causal, "only causal attention is written"
    if _use_fa3(q):
        from flash_attn_interface import flash_attn_func as fa3

        return fa3(q, k, v, causal=True, window_size=window_size)
    left, T = window_size[0], q.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if left < 0 or left >= T - 1:
        y = _sdpa(q, k, v, causal=True)
    elif left == 0:  # each token sees itself alone
        y = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    else:
        y = _windowed(q, k, v, left)
    return y.transpose(1, 2)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_batch_idx=None, causal=True, window_size=(-1, -1)
):
    """Attention of new tokens to a cache, which first takes in their keys and values in place.

    k, v (B, T, H_kv, D) of the new tokens; q (B, Q, H, D) of the last Q <= T of them; k_cache, v_cache
    (R, S, H_kv, D); cache_seqlens (B,) int32, how many positions of each row are already
    filled; cache_batch_idx (B,) int32, which rows of the cache are meant (None: all, in order).
    Row b's new tokens stand at cache_seqlens[b] .. cache_seqlens[b] + T - 1. The caller moves
    `cache_seqlens` forward. Returns (B, Q, H, D).
    """
    assert causal, "only causal attention is written"
    if _use_fa3(q):
        from flash_attn_interface import flash_attn_with_kvcache as fa3

        return fa3(
            q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
            causal=True, window_size=window_size,
        )  # fmt: skip
    B, Q = q.shape[:2]
    T = Q if k is None else k.size(1)
    rows = torch.arange(B, device=q.device) if cache_batch_idx is None else cache_batch_idx
    positions = cache_seqlens[:, None] + torch.arange(T, device=q.device)  # (B, T)
    if k is not None:
        k_cache[rows[:, None], positions] = k.to(k_cache.dtype)
        v_cache[rows[:, None], positions] = v.to(v_cache.dtype)
    window = window_size[0] if window_size[0] >= 0 else k_cache.size(1)
    if q.device.type == "cpu":
        return _cached_by_groups(q, k_cache, v_cache, rows.tolist(), positions[:, T - Q].tolist(), window)
    columns, positions = torch.arange(k_cache.size(1), device=q.device), positions[:, T - Q :, None]
    mask = (columns <= positions) & (columns >= positions - window)  # (B, Q, S)
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache.index_select(0, rows), v_cache.index_select(0, rows)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return _sdpa(q, k.to(q.dtype), v.to(q.dtype), mask=mask[:, None]).transpose(1, 2)


def _cached_by_groups(q, k_cache, v_cache, rows: list[int], starts: list[int], window: int):
    """The same where reading a number costs nothing: only keys that are seen are read, and none is copied.

    The queries of a row stand at `starts` and after. Rows that lie next to one another in the cache and are about as long are one call; others are calls of
    their own. A row that is alone needs no mask.
    """
    Q, outputs, first = q.size(1), [], 0
    for group in _groups(rows, starts):
        last = first + len(group)
        start, end = max(0, min(group) - window), max(group) + Q
        cached = slice(rows[first], rows[first] + len(group)), slice(start, end)
        k, v = (cache[cached].transpose(1, 2).to(q.dtype) for cache in (k_cache, v_cache))  # (n, H_kv, end - start, D)
        mask = None
        if Q > 1 or start + window < max(group) or min(group) < max(group):
            columns = torch.arange(start, end)
            positions = torch.tensor(group)[:, None, None] + torch.arange(Q)[:, None]  # (n, Q, 1)
            mask = ((columns <= positions) & (columns >= positions - window))[:, None]
        outputs.append(_sdpa(q[first:last].transpose(1, 2), k, v, mask=mask))
        first = last
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).transpose(1, 2)


def _groups(rows: list[int], seqlens: list[int]) -> list[list[int]]:
    """The lengths of rows, cut where two are not neighbours and where the longest would cost the others too much.

    >>> _groups([3, 4, 5, 9], [100, 110, 900, 100])
    [[100, 110], [900], [100]]
    """
    groups = [[seqlens[0]]]
    for before, row, seqlen in zip(rows, rows[1:], seqlens[1:]):
        group = [*groups[-1], seqlen]
        if row == before + 1 and len(group) * max(group) <= 2 * sum(group) + 64 * len(group):
            groups[-1] = group
        else:
            groups.append([seqlen])
    return groups


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
