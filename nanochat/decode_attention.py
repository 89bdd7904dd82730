"""Attention of one new token per row to a cache, as a Triton kernel, for GPUs without Flash Attention 3.

The one idea: reading the cache is all the work there is, so keys and values are read once, where they lie, and
only those that are seen; PyTorch's own attention would first copy the rows and then read all of their length. A row's
keys are cut into parts, so that few rows too keep the whole chip busy, and a second kernel puts the parts together
(flash decoding, arXiv:2311.01282). The new token's own key and value are put into the cache on the way.

Triton is imported when a kernel is first asked for. In its interpreter (TRITON_INTERPRET=1) the same kernels run on a CPU,
which is how they are tested.
"""

from __future__ import annotations

from functools import lru_cache

import torch

BLOCK = 64  # keys that a program looks at at a time, for one query head; fewer where several share a key
PROGRAMS = 256  # about two for each multiprocessor of a Hopper GPU


@lru_cache(maxsize=None)
def kernels():
    """(attend, combine). Inside a function so that importing this file needs no Triton."""
    global tl  # the kernels look for it among the names of this file
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        q, k_new, v_new, k_cache, v_cache, seqlens, rows, out, stats,
        row_stride, position_stride, head_stride, scale, window, parts,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One part of one row's keys, for the GROUP query heads (padded to G) that share a key head."""
        b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        last = tl.load(seqlens + b)  # where the new token stands
        first = tl.maximum(last - window, 0)
        share = tl.cdiv(tl.cdiv(last + 1 - first, parts), BLOCK) * BLOCK
        start = first + part * share
        end = tl.minimum(start + share, last + 1)
        base = tl.load(rows + b).to(tl.int64) * row_stride + h * head_stride

        heads, dims = tl.arange(0, G), tl.arange(0, D)
        real = heads < GROUP
        queries = (b * KV_HEADS + h) * GROUP + heads
        asked = tl.load(q + queries[:, None] * D + dims[None, :], mask=real[:, None], other=0.0).to(tl.float32)  # (G, D)
        own = (b * KV_HEADS + h) * D + dims
        key, value = tl.load(k_new + own), tl.load(v_new + own)
        if (start <= last) & (last < end):
            tl.store(k_cache + base + last * position_stride + dims, key)
            tl.store(v_cache + base + last * position_stride + dims, value)

        best = tl.full((G,), -float("inf"), tl.float32)
        total = tl.zeros((G,), tl.float32)
        mixed = tl.zeros((G, D), tl.float32)
        for at in range(start, end, BLOCK):
            positions = at + tl.arange(0, BLOCK)
            cached, new = positions < tl.minimum(end, last), positions == last
            where = base + positions[:, None] * position_stride + dims[None, :]
            keys = tl.load(k_cache + where, mask=cached[:, None], other=0.0).to(tl.float32)  # (BLOCK, D)
            keys = tl.where(new[:, None], key.to(tl.float32)[None, :], keys)
            values = tl.load(v_cache + where, mask=cached[:, None], other=0.0).to(tl.float32)
            values = tl.where(new[:, None], value.to(tl.float32)[None, :], values)
            scores = tl.sum(asked[:, None, :] * keys[None, :, :], axis=2) * scale  # (G, BLOCK)
            scores = tl.where((cached | (new & (positions < end)))[None, :], scores, -float("inf"))
            larger = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp(scores - larger[:, None])
            shrink = tl.exp(best - larger)
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = mixed * shrink[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], axis=1)
            best = larger
        place = queries * parts + part
        tl.store(out + place[:, None] * D + dims[None, :], mixed, mask=real[:, None])
        tl.store(stats + place * 2, best, mask=real)
        tl.store(stats + place * 2 + 1, total, mask=real)

    @triton.jit
    def combine(out, stats, y, parts, PARTS: tl.constexpr, D: tl.constexpr):
        """The parts of one query head, each weighed by its sum of exponentials."""
        query = tl.program_id(0)
        each, dims = tl.arange(0, PARTS), tl.arange(0, D)
        there = each < parts
        best = tl.load(stats + (query * parts + each) * 2, mask=there, other=-float("inf"))
        total = tl.load(stats + (query * parts + each) * 2 + 1, mask=there, other=0.0)
        weights = tl.exp(best - tl.max(best, axis=0))  # 0 for a part that saw nothing
        mixed = tl.load(out + (query * parts + each)[:, None] * D + dims[None, :], mask=there[:, None], other=0.0)
        result = tl.sum(weights[:, None] * mixed, axis=0) / tl.sum(weights * total, axis=0)
        tl.store(y + query * D + dims, result.to(y.dtype.element_ty))

    return attend, combine


def decode_attention(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx=None, window: int = -1) -> torch.Tensor:
    """q (B, 1, H, D) of the new tokens, after k, v (B, 1, H_kv, D) have been put into the cache; returns (B, 1, H, D).

    k_cache, v_cache (R, S, H_kv, D); D a power of two. Row b's token stands at cache_seqlens[b] (int32) of row
    cache_batch_idx[b] (None: b) and sees `window` tokens before itself (-1: all). Nothing here waits for the GPU or depends
    on a length, so it can be captured as a CUDA graph.
    """
    B, _, H, D = q.shape
    kv_heads = k.size(2)
    attend, combine = kernels()
    rows = torch.arange(B, device=q.device, dtype=torch.int32) if cache_batch_idx is None else cache_batch_idx
    q, k, v = (x.contiguous() for x in (q, k.to(k_cache.dtype), v.to(v_cache.dtype)))
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    parts = max(1, min(PROGRAMS // (B * kv_heads), k_cache.size(1) // BLOCK, 32))
    out = torch.empty(B * H * parts, D, device=q.device, dtype=torch.float32)
    stats = torch.empty(B * H * parts, 2, device=q.device, dtype=torch.float32)
    y = torch.empty_like(q)
    group = H // kv_heads
    G = 1 << (group - 1).bit_length()
    attend[(B, kv_heads, parts)](
        q, k, v, k_cache, v_cache, cache_seqlens, rows, out, stats,
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), D**-0.5, window if window >= 0 else k_cache.size(1), parts,
        KV_HEADS=kv_heads, GROUP=group, G=G, D=D, BLOCK=max(16, BLOCK // G),
    )  # fmt: skip
    combine[(B * H,)](out, stats, y, parts, PARTS=1 << (parts - 1).bit_length(), D=D)
    return y
