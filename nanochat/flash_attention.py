"""Attention behind one name: `flash_attn.flash_attn_func` and `flash_attn.flash_attn_with_kvcache`.

The layout and the arguments are Flash Attention's: tensors are (B, T, H, D), keys and values may have fewer heads than
queries (grouped-query attention), and `window_size` is `(left, 0)`: a query sees itself and `left` tokens before (-1: all).

A CPU, and any other device without a better kernel, uses PyTorch's `scaled_dot_product_attention`. A window saves work
there too: queries are cut into blocks of the window's length, and each block attends to its own keys and those of the
previous block. That is exact and costs O(T * window). On a GPU the first of `candidates` that agrees with this exact
attention is used, and a printed line says why no faster one is.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat.common import print0
from nanochat.decode_attention import decode_attention

_override_impl = None  # tests and benchmarks set "sdpa" or the name of the only candidate to try

WHOLE, CACHE = "attention", "attention to a cache"  # the kinds of calls, as printed
MAX_ERROR = 2e-2  # relative to exact attention; rounding to bfloat16 causes 5e-3, a mask that is off by one 8e-2


# -----------------------------------------------------------------------------
# Kernels for GPUs


@lru_cache(maxsize=None)
def fa3_module():
    """The installed Flash Attention 3, or else a build for this torch from the `kernels` hub, whose builds are versioned."""
    if torch.cuda.get_device_capability()[0] != 9:
        raise RuntimeError("needs a Hopper GPU")
    try:
        import flash_attn_interface

        return flash_attn_interface
    except ImportError:
        from kernels import get_kernel

        return get_kernel("kernels-community/flash-attn3", version=1)


def fa3():
    kernel = fa3_module().flash_attn_func

    def attend(q, k, v, window):
        y = kernel(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # builds of 2024 return the log-sum-exp as well

    return attend


def aten(q, k, v, window):
    """PyTorch's Flash Attention 2, called directly, since `scaled_dot_product_attention` has no window."""
    T = q.size(1)
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, None, None, T, T, 0.0, True, False, window_size_left=window, window_size_right=0)[0]


def candidates(device: torch.device, kind: str) -> dict:
    """{name: function that returns the kernel, or raises} for a kind of call, fastest first.

    On an H100 at head dimension 128 Flash Attention 3 runs at 521 TFLOP/s (forward, causal), Flash Attention 2 at 298
    (arXiv:2407.08608, figure 5). cuDNN, at 484, has no window here and plans every new shape for 0.4 s.
    """
    if device.type != "cuda":
        return {}
    if kind == CACHE:
        return {"fa3": lambda: fa3_module().flash_attn_with_kvcache, "triton": lambda: _triton_cached}
    return {"fa3": fa3, "aten": lambda: aten}


# -----------------------------------------------------------------------------
# Selection

_chosen = {}  # kind of call -> (name, function)


def choose(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> str:
    """The name of the kernel for whole sequences; `heads` are (n_head, n_kv_head, head_dim).

    The first call tests the kernels, for seconds, and prints a line. Call this before a model is compiled; eager calls do
    so themselves.
    """
    return _kernel(device, dtype, heads, WHOLE)[0]


def _kernel(device, dtype, heads, kind):
    """(name, function) for calls of this kind; chosen once."""
    key = (device, dtype, heads, kind, _override_impl)
    if key in _chosen:  # a compiled graph treats the entry as a constant and recompiles if it changes
        return _chosen[key]
    exact, check = (_cached, _check_cached) if kind == CACHE else (_blockwise, _check)
    kernels = {name: load for name, load in candidates(device, kind).items() if _override_impl in (None, name)}
    if not kernels:
        return "sdpa", exact
    if torch.compiler.is_compiling() or device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call flash_attention.choose before compiling, or attend once before capturing")

    reasons = []
    for name, load in kernels.items():
        try:
            attend = load()
            check(attend, device, dtype, heads)
            break
        except Exception as error:  # any failure: its reason is printed, and the next kernel is tried
            reason = str(error).strip() or type(error).__name__
            reasons.append(f"{name}: {reason.splitlines()[0][:100]}")
    else:
        name, attend = "sdpa", exact
    print0(f"{kind}: {name} ({'; '.join(reasons)})" if reasons else f"{kind}: {name}")
    _chosen[key] = name, attend
    return _chosen[key]


@torch.inference_mode(False)
@torch.enable_grad()
def _check(attend, device, dtype, heads) -> None:
    """Raise unless `attend` agrees with exact attention, forward and backward, eager and as one compiled graph."""
    H, H_kv, D = heads
    g = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(2, 256, h, D, generator=g, device=device).to(dtype) for h in (H, H_kv, H_kv, H)]

    def run(attend, window, q, k, v, d_y):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        y = attend(*leaves, window)
        return y.detach(), *torch.autograd.grad(y, leaves, d_y)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for how, window in ((attend, -1), (attend, 32), (compiled, 32)):
        expected = run(_blockwise, window, *(x.float() for x in inputs))
        actual = run(how, window, *(x.clone() for x in inputs))
        _compare(actual, expected)


@torch.inference_mode(False)
def _check_cached(attend, device, dtype, heads) -> None:
    """Raise unless `attend` agrees with `_cached` for two rows of different lengths, prefilling and decoding."""
    H, H_kv, D = heads
    g = torch.Generator(device).manual_seed(0)
    lengths = torch.tensor([7, 280], dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0], dtype=torch.int32, device=device)
    for new, window in ((3, -1), (1, 5)):
        shapes = (2, new, H), (4, 300, H_kv), (4, 300, H_kv), (2, new, H_kv), (2, new, H_kv)
        inputs = [torch.randn(*shape, D, generator=g, device=device).to(dtype) for shape in shapes]
        exact = [x.to(torch.float32, copy=True) for x in inputs]
        arguments = {"cache_seqlens": lengths, "cache_batch_idx": rows, "causal": True, "window_size": (window, 0)}
        y, expected = attend(*inputs, **arguments), _cached(*exact, **arguments)
        _compare([y, *inputs[1:3]], [expected, *exact[1:3]])  # the caches, too


def _compare(got, expected) -> None:
    for a, b in zip(got, expected):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error <= MAX_ERROR:  # also if it is NaN
            raise ValueError(f"a relative error of {error:.2g}")


# -----------------------------------------------------------------------------
# Attention of whole sequences


def _sdpa(q, k, v, mask=None, causal=False):
    """PyTorch's attention on (B, H, T, D), with each key head shared by a group of query heads."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def _mask(keys: torch.Tensor, queries: torch.Tensor, window: int) -> torch.Tensor:
    """Which of the keys at positions (S,) the queries at positions (..., 1) see: (..., S) bool.

    For the keys of two blocks of 2, the queries of the second one and a window of 2:
        1 1 1 0
        0 1 1 1
    """
    return (keys <= queries) & (keys >= queries - window)


def _windowed(q, k, v, window: int):
    """Causal attention where each query sees `window` tokens before itself; (B, H, T, D) in and out."""
    B, H, T, D = q.shape
    blocks = -(-T // window)
    pad = blocks * window - T
    if pad:  # padded keys come after all real queries, which do not see them
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    first = _sdpa(*(x[:, :, :window] for x in (q, k, v)), causal=True)  # (B, H, w, D)

    def fold(x):  # (B, H, blocks - 1, w', D) -> (B * (blocks - 1), H, w', D)
        return x.transpose(1, 2).flatten(0, 1)

    def with_previous(x):  # keys of each later block, its predecessor's in front
        x = x.unflatten(2, (blocks, window))
        return fold(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3))

    later = fold(q[:, :, window:].unflatten(2, (blocks - 1, window)))
    positions = torch.arange(2 * window, device=q.device)
    later = _sdpa(later, with_previous(k), with_previous(v), mask=_mask(positions, positions[window:, None], window))
    later = later.unflatten(0, (B, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, later], dim=2)[:, :, :T]


def _blockwise(q, k, v, left: int):
    """Causal attention of (B, T, H, D), exact and on any device; `left` is below T - 1, or -1."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if left < 0:
        y = _sdpa(q, k, v, causal=True)
    elif left == 0:  # each token sees itself alone
        y = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    else:
        y = _windowed(q, k, v, left)
    return y.transpose(1, 2)


def flash_attn_func(q, k, v, causal=True, window_size=(-1, -1)):
    """Self-attention over whole sequences.

    q (B, T, H, D); k, v (B, T, H_kv, D) with H_kv dividing H; returns (B, T, H, D).
    """
    assert causal, "only causal attention is implemented"
    left = window_size[0] if 0 <= window_size[0] < q.size(1) - 1 else -1
    _, attend = _kernel(q.device, q.dtype, (q.size(2), k.size(2), q.size(3)), WHOLE)
    return attend(q, k, v, left)


# -----------------------------------------------------------------------------
# Attention to a cache


def flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx=None, causal=True, window_size=(-1, -1)):
    """Attention of new tokens to a cache, into which their keys and values are written first, in place.

    k, v (B, T, H_kv, D) of the new tokens; q (B, Q, H, D) of the last Q <= T of them; k_cache, v_cache (R, S, H_kv, D);
    cache_seqlens (B,) int32, the number of filled positions of each row; cache_batch_idx (B,) int32, the rows of the
    cache (None: all, in order). The new tokens of row b have the positions cache_seqlens[b] .. cache_seqlens[b] + T - 1.
    The caller advances `cache_seqlens`. Returns (B, Q, H, D).
    """
    assert causal, "only causal attention is implemented"
    return Places(cache_seqlens, cache_batch_idx, k.size(1)).attend(q, k_cache, v_cache, k, v, window_size[0])


class Places:
    """Where T new tokens of each row go in a cache: the same in all layers, so it is computed once for a pass."""

    def __init__(self, cache_seqlens: torch.Tensor, cache_batch_idx: torch.Tensor | None, T: int):
        self.cache_seqlens = cache_seqlens
        self.cache_batch_idx = cache_batch_idx
        self.positions = cache_seqlens.long()[:, None] + torch.arange(T, device=cache_seqlens.device)  # (B, T)
        if cache_seqlens.device.type == "cpu":
            rows = torch.arange(len(cache_seqlens)) if cache_batch_idx is None else cache_batch_idx.long()
            self.rows, self.index, self.masks = rows.tolist(), (rows[:, None], self.positions), {}
            self.groups = _groups(self.rows, cache_seqlens.tolist())

    def attend(self, q, k_cache, v_cache, k, v, window: int):
        if q.device.type == "cpu" and not candidates(q.device, CACHE):
            return self._attend_by_groups(q, k_cache, v_cache, k, v, window)
        return _attend_to_cache(q, k_cache, v_cache, k, v, self.cache_seqlens, self.cache_batch_idx, window)

    def _attend_by_groups(self, q, k_cache, v_cache, k, v, window: int):
        """For a CPU, where lengths are known without waiting: reads only visible keys and copies none."""
        k_cache[self.index] = k.to(k_cache.dtype)
        v_cache[self.index] = v.to(v_cache.dtype)
        Q, T, outputs, first = q.size(1), k.size(1), [], 0
        window = window if window >= 0 else k_cache.size(1)
        for group in self.groups:
            last = first + len(group)
            start, end = max(0, min(group) + T - Q - window), max(group) + T
            mask = None
            if Q > 1 or min(group) < max(group):
                key = first, window, Q
                if key not in self.masks:
                    queries = self.positions[first:last, T - Q :, None]  # (n, Q, 1)
                    self.masks[key] = _mask(torch.arange(start, end), queries, window)[:, None]
                mask = self.masks[key]
            cached = slice(self.rows[first], self.rows[first] + len(group)), slice(start, end)
            k, v = (cache[cached].transpose(1, 2).to(q.dtype) for cache in (k_cache, v_cache))  # (n, H_kv, end - start, D)
            outputs.append(_sdpa(q[first:last].transpose(1, 2), k, v, mask=mask))
            first = last
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).transpose(1, 2)


@torch.library.custom_op("nanochat::attend_to_cache", mutates_args=("k_cache", "v_cache"))
def _attend_to_cache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    cache_seqlens: torch.Tensor, cache_batch_idx: torch.Tensor | None, window: int,
) -> torch.Tensor:  # fmt: skip
    """The chosen kernel as an operator that tells the compiler that the cache changes."""
    _, attend = _kernel(q.device, q.dtype, (q.size(2), k_cache.size(2), q.size(3)), CACHE)
    return attend(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
        causal=True, window_size=(window, 0),
    )  # fmt: skip


@_attend_to_cache.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def _groups(rows: list[int], seqlens: list[int]) -> list[list[int]]:
    """The lengths of rows, split where rows are not neighbours and where padding to the longest would cost too much.

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


def _triton_cached(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx=None, causal=True, window_size=(-1, -1)):
    """`flash_attn_with_kvcache` that decodes one new token per row with our Triton kernel."""
    if k.size(1) > 1:
        return _cached(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, causal, window_size)
    return decode_attention(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, window_size[0])


def _cached(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx=None, causal=True, window_size=(-1, -1)):
    """`flash_attn_with_kvcache`, exact and on any device."""
    (B, Q), T = q.shape[:2], k.size(1)
    rows = torch.arange(B, device=q.device) if cache_batch_idx is None else cache_batch_idx
    positions = cache_seqlens[:, None] + torch.arange(T, device=q.device)  # (B, T)
    k_cache[rows[:, None], positions] = k.to(k_cache.dtype)
    v_cache[rows[:, None], positions] = v.to(v_cache.dtype)
    window = window_size[0] if window_size[0] >= 0 else k_cache.size(1)
    mask = _mask(torch.arange(k_cache.size(1), device=q.device), positions[:, T - Q :, None], window)  # (B, Q, S)
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache.index_select(0, rows), v_cache.index_select(0, rows)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return _sdpa(q, k.to(q.dtype), v.to(q.dtype), mask=mask[:, None]).transpose(1, 2)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
