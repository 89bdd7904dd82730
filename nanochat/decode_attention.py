"""Attention of one new token per row to a cache, as a Triton kernel, for GPUs without Flash Attention 3.

Decoding is bound by reading the cache, so visible keys and values are read once and in place; PyTorch's attention
would copy the rows first and then read their whole length. The keys of a row are split into parts, so that a few rows
also occupy the whole GPU, and a second kernel combines the parts (flash decoding, arXiv:2311.01282). The first kernel
also writes the new token's key and value to the cache. Tests run both on a CPU, in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from functools import lru_cache

import torch

BLOCK = 64  # keys per iteration for one query head; fewer if several heads share a key
PROGRAMS = 256  # about two per multiprocessor of a Hopper GPU


@lru_cache(maxsize=None)
def kernels():
    """(attend, combine). In a function, so that importing this module needs no Triton."""
    global tl  # Triton resolves it among the globals of this module
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        q, k_new, v_new, k_cache, v_cache, seqlens, rows, out, stats,
        q_stride, k_stride, v_stride, row_stride, position_stride, head_stride, scale, window, parts,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One part of one row's keys, for the GROUP query heads (padded to G) that share a key head."""
        b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        last = tl.load(seqlens + b)  # position of the new token
        first = tl.maximum(last - window, 0)
        share = tl.cdiv(tl.cdiv(last + 1 - first, parts), BLOCK) * BLOCK
        start = first + part * share
        end = tl.minimum(start + share, last + 1)
        base = tl.load(rows + b).to(tl.int64) * row_stride + h * head_stride

        heads, dims = tl.arange(0, G), tl.arange(0, D)
        real = heads < GROUP
        own = h * GROUP + heads
        query = tl.load(q + b * q_stride + own[:, None] * D + dims[None, :], mask=real[:, None], other=0.0)  # (G, D)
        query = query.to(tl.float32)
        key, value = tl.load(k_new + b * k_stride + h * D + dims), tl.load(v_new + b * v_stride + h * D + dims)
        if (start <= last) & (last < end):
            tl.store(k_cache + base + last * position_stride + dims, key)
            tl.store(v_cache + base + last * position_stride + dims, value)

        maximum = tl.full((G,), -float("inf"), tl.float32)
        total = tl.zeros((G,), tl.float32)
        weighted = tl.zeros((G, D), tl.float32)
        for at in range(start, end, BLOCK):
            positions = at + tl.arange(0, BLOCK)
            cached, new = positions < tl.minimum(end, last), positions == last
            where = base + positions[:, None] * position_stride + dims[None, :]
            keys = tl.load(k_cache + where, mask=cached[:, None], other=0.0).to(tl.float32)  # (BLOCK, D)
            keys = tl.where(new[:, None], key.to(tl.float32)[None, :], keys)
            values = tl.load(v_cache + where, mask=cached[:, None], other=0.0).to(tl.float32)
            values = tl.where(new[:, None], value.to(tl.float32)[None, :], values)
            scores = tl.sum(query[:, None, :] * keys[None, :, :], axis=2) * scale  # (G, BLOCK)
            scores = tl.where((cached | (new & (positions < end)))[None, :], scores, -float("inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_maximum[:, None])
            rescale = tl.exp(maximum - new_maximum)
            total = total * rescale + tl.sum(weights, axis=1)
            weighted = weighted * rescale[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], axis=1)
            maximum = new_maximum
        place = (b * KV_HEADS * GROUP + own) * parts + part
        tl.store(out + place[:, None] * D + dims[None, :], weighted, mask=real[:, None])
        tl.store(stats + place * 2, maximum, mask=real)
        tl.store(stats + place * 2 + 1, total, mask=real)

    @triton.jit
    def combine(out, stats, y, parts, PARTS: tl.constexpr, D: tl.constexpr):
        """Combines the parts of one query head, weighted by their sums of exponentials."""
        query = tl.program_id(0)
        each, dims = tl.arange(0, PARTS), tl.arange(0, D)
        valid = each < parts
        maximum = tl.load(stats + (query * parts + each) * 2, mask=valid, other=-float("inf"))
        total = tl.load(stats + (query * parts + each) * 2 + 1, mask=valid, other=0.0)
        weights = tl.exp(maximum - tl.max(maximum, axis=0))  # 0 for an empty part
        weighted = tl.load(out + (query * parts + each)[:, None] * D + dims[None, :], mask=valid[:, None], other=0.0)
        result = tl.sum(weights[:, None] * weighted, axis=0) / tl.sum(weights * total, axis=0)
        tl.store(y + query * D + dims, result.to(y.dtype.element_ty))

    return attend, combine


def decode_attention(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx=None, window: int = -1) -> torch.Tensor:
    """Attention of q (B, 1, H, D) to a cache, after k, v (B, 1, H_kv, D) have been written to it; returns (B, 1, H, D).

    k_cache, v_cache (R, S, H_kv, D); D a power of two. Token b has the position cache_seqlens[b] (int32) in row
    cache_batch_idx[b] (None: b) and sees `window` tokens before itself (-1: all). Nothing here waits for the GPU or
    depends on a length, so it can be captured in a CUDA graph.
    """
    B, _, H, D = q.shape
    kv_heads = k.size(2)
    attend, combine = kernels()
    rows = torch.arange(B, device=q.device, dtype=torch.int32) if cache_batch_idx is None else cache_batch_idx
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    assert all(x.stride()[2:] == (D, 1) for x in (q, k, v)), "the heads of a token must follow each other"
    parts = max(1, min(PROGRAMS // (B * kv_heads), k_cache.size(1) // BLOCK, 32))
    out = torch.empty(B * H * parts, D, device=q.device, dtype=torch.float32)
    stats = torch.empty(B * H * parts, 2, device=q.device, dtype=torch.float32)
    y = q.new_empty(q.shape)
    group = H // kv_heads
    G = 1 << (group - 1).bit_length()
    attend[(B, kv_heads, parts)](
        q, k, v, k_cache, v_cache, cache_seqlens, rows, out, stats,
        q.stride(0), k.stride(0), v.stride(0), *k_cache.stride()[:3],
        D**-0.5, window if window >= 0 else k_cache.size(1), parts,
        KV_HEADS=kv_heads, GROUP=group, G=G, D=D, BLOCK=max(16, BLOCK // G),
    )  # fmt: skip
    combine[(B * H,)](out, stats, y, parts, PARTS=1 << (parts - 1).bit_length(), D=D)
    return y
