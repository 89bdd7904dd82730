"""Kernels for causal attention in training, each behind one small function, and the order in which to try them.

`BACKENDS[name](device)` either returns `attend(q, k, v, window) -> y`, differentiable and free of graph
breaks, or raises with the reason why it cannot. Shapes are Flash Attention's: q, y (B, T, H, D); k, v (B, T,
H_kv, D); a query sees `window` tokens before itself and itself, or all if it is -1. The choice is made by
`flash_attention.choose`, which compares each with exact attention.

Published speeds in TFLOP/s on an H100 at head dimension 128 and 2,048 tokens. None of them was measured by us;
`dev/bench/gpu.py` does that.

                             forward, causal    backward, not causal
    Flash Attention 3             521                  501               arXiv:2407.08608, figures 5 and 6
    cuDNN 9 (July 2024)           484                  465               the same
    Flash Attention 2             298                  291               the same; also PyTorch's aten kernel
    plain PyTorch operations         34                  159               the same

On a B200 Flash Attention 4 is up to 1.3 times as fast as cuDNN 9.13 (arXiv:2603.05451, abstract). With a window
these ratios hold roughly, since all but cuDNN SDPA, which has no window, skip the blocks outside of it.

FlexAttention is left out: its announcement (pytorch.org/blog/flexattention) gives it 0.9 times the speed of Flash
Attention 2 forward and 0.85 times backward, it needs a block mask per length, and aten runs on every GPU that it supports.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F


def order(device: torch.device) -> tuple[str, ...]:
    """Names to try on a GPU, fastest first by the figures above. The fallback after them is exact blockwise SDPA."""
    major = torch.cuda.get_device_capability(device)[0]
    if major == 9:  # Hopper
        return "fa3", "cudnn", "fa4", "cudnn_sdpa", "aten"
    if major == 10:  # Blackwell in data centres
        return "fa4", "cudnn", "cudnn_sdpa", "aten"
    return "aten", "cudnn", "cudnn_sdpa"  # PyTorch itself prefers its Flash Attention 2 here


def _needs(device: torch.device, *majors: int) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"needs a GPU, not {device.type}")
    major, minor = torch.cuda.get_device_capability(device)
    if majors and major not in majors:
        raise RuntimeError(f"not for compute capability {major}.{minor}")


# -----------------------------------------------------------------------------
# Flash Attention 3


@lru_cache(maxsize=None)
def fa3_module():
    """The installed Flash Attention 3, or else a build for this torch from the `kernels` hub, whose builds are versioned."""
    if find_spec("flash_attn_interface") is not None:
        import flash_attn_interface

        return flash_attn_interface
    if find_spec("kernels") is None:
        raise ImportError("not installed")
    from kernels import get_kernel

    return get_kernel("kernels-community/flash-attn3", version=1)


def fa3(device: torch.device):
    _needs(device, 9)
    kernel = fa3_module().flash_attn_func

    def attend(q, k, v, window):
        y = kernel(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # builds of 2024 return the log-sum-exp as well

    return attend


# -----------------------------------------------------------------------------
# Kernels in PyTorch


def aten(device: torch.device):
    """PyTorch's Flash Attention 2, called directly, since `scaled_dot_product_attention` has no window."""
    _needs(device)

    def attend(q, k, v, window):
        T = q.size(1)
        forward = torch.ops.aten._flash_attention_forward
        return forward(q, k, v, None, None, T, T, 0.0, True, False, window_size_left=window, window_size_right=0)[0]

    return attend


def cudnn_sdpa(device: torch.device):
    """cuDNN as PyTorch calls it: without a window."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _needs(device)

    def attend(q, k, v, window):
        if window >= 0:
            raise RuntimeError("has no window")
        grouped = q.size(2) != k.size(2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return attend


# -----------------------------------------------------------------------------
# Kernels that are a forward and a backward function: custom operators make them differentiable and opaque to the compiler


@torch.library.custom_op("nanochat::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (B, T, H, D), log-sum-exp (B, H, T, 1) float32), both contiguous."""
    return KERNELS[kernel][0](q.detach(), k.detach(), v.detach(), window)  # DLPack refuses tensors that require gradients


@attention.register_fake
def _(q, k, v, window, kernel):
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, 1, dtype=torch.float32)


@torch.library.custom_op("nanochat::attention_backward", mutates_args=())
def attention_backward(
    d_y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lse: torch.Tensor,
    window: int, kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients with respect to q, k and v, contiguous."""
    return KERNELS[kernel][1](*(x.detach() for x in (d_y, q, k, v, y, lse)), window)


@attention_backward.register_fake
def _(d_y, q, k, v, y, lse, window, kernel):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    *qkv, ctx.window, ctx.kernel = inputs
    ctx.save_for_backward(*qkv, *output)


def _gradients(ctx, d_y, _d_lse):
    return *attention_backward(d_y, *ctx.saved_tensors, ctx.window, ctx.kernel), None, None


attention.register_autograd(_gradients, setup_context=_save_for_backward)


def cudnn_graphs(device: torch.device):
    """cuDNN's graph API (pip install nvidia-cudnn-frontend), over the cuDNN that PyTorch has loaded."""
    _needs(device)
    if find_spec("cudnn") is None:
        raise ImportError("not installed")

    def attend(q, k, v, window):
        T = q.size(1)
        pad = -T % 128  # a graph is built per shape; padding keeps their number small in evaluation
        if pad:  # padded keys come after all real queries
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        return attention(q, k, v, window, "cudnn")[0][:, :T]

    return attend


def fa4(device: torch.device):
    """Flash Attention 4 through its forward and backward functions; its public function causes a graph break."""
    _needs(device, 9, 10)
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise ImportError("not installed")

    def attend(q, k, v, window):
        return attention(q, k, v, window, "fa4")[0]

    return attend


def _fa4_options(q, window: int) -> dict:
    left = window if window >= 0 else None
    return {"softmax_scale": q.size(-1) ** -0.5, "causal": True, "window_size_left": left, "window_size_right": 0}


def _fa4_forward(q, k, v, window):
    from flash_attn.cute.interface import _flash_attn_fwd

    y, lse = _flash_attn_fwd(q, k, v, return_lse=True, **_fa4_options(q, window))[:2]  # lse (B, H, T)
    return y, lse.contiguous().unsqueeze(-1)


def _fa4_backward(d_y, q, k, v, y, lse, window):
    from flash_attn.cute.interface import _flash_attn_bwd

    gradients = _flash_attn_bwd(q, k, v, y, d_y.contiguous(), lse.squeeze(-1), **_fa4_options(q, window))
    return tuple(x.contiguous() for x in gradients[:3])


# -----------------------------------------------------------------------------
# cuDNN's graphs


def _cudnn_forward(q, k, v, window):
    B, T, H, D = q.shape
    y, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, 1, dtype=torch.float32)
    _run_cudnn(False, window, lse, (q, k, v), (y,))
    return y, lse


def _cudnn_backward(d_y, q, k, v, y, lse, window):
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    _run_cudnn(True, window, lse, (q, k, v, y, d_y), gradients)
    return gradients


KERNELS = {"cudnn": (_cudnn_forward, _cudnn_backward), "fa4": (_fa4_forward, _fa4_backward)}


def _run_cudnn(backward: bool, window: int, lse: torch.Tensor, inputs: tuple, outputs: tuple) -> None:
    """Run the graph for these shapes on the current stream; tensors are (B, T, H, D), read and written in place."""
    import cudnn

    tensors = [lse, *(x.transpose(1, 2) for x in (*map(_aligned, inputs), *outputs))]
    device, geometry = lse.device, tuple((tuple(x.shape), x.stride()) for x in tensors)
    with torch.cuda.device(device):
        handle = _cudnn_handle(device)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        graph, slots = cudnn_graph(backward, window, tensors[1].dtype, geometry, handle)
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
        graph.execute(dict(zip(slots, tensors)), workspace, handle=handle)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied if it is not aligned to the 16 bytes that cuDNN reads at a time, which it does not check on Hopper."""
    step = 16 // x.element_size()
    fits = x.stride(-1) == 1 and all(s > 0 and s % step == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=None)
def _cudnn_handle(device: torch.device):
    import cudnn

    return cudnn.create_handle()


@lru_cache(maxsize=256)
def cudnn_graph(backward: bool, window: int, dtype: torch.dtype, geometry: tuple, handle):
    """A built graph and its tensors lse, q, k, v, y and, backward, d_y, d_q, d_k, d_v; all (B, H, T, D) by shape and stride.

    `geometry` is the (shape, stride) of each. Built once per shape. The backward graph needs working memory as large as q in
    float32 (docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html).
    """
    import cudnn

    half = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[dtype]
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle)

    def declare(slot: int):
        shape, stride = geometry[slot]
        return graph.tensor(dim=list(shape), stride=list(stride), data_type=half if slot else single)

    D = geometry[1][0][-1]
    options = {"attn_scale": D**-0.5, "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
    if window >= 0:  # cuDNN counts the query itself: it keeps keys with column + bound > row
        options["diagonal_band_left_bound"] = window + 1
    q, k, v = map(declare, (1, 2, 3))
    if backward:
        lse, y, d_y = map(declare, (0, 4, 5))
        outputs = graph.sdpa_backward(q=q, k=k, v=v, o=y, dO=d_y, stats=lse, **options)
        slots, first = (lse, q, k, v, y, d_y, *outputs), 6
    else:
        y, lse = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **options)
        lse.set_output(True).set_data_type(single)
        outputs, slots, first = (y,), (lse, q, k, v, y), 4
    for x, (shape, stride) in zip(outputs, geometry[first:]):
        x.set_output(True).set_dim(list(shape)).set_stride(list(stride))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, slots


BACKENDS = {"fa3": fa3, "cudnn": cudnn_graphs, "fa4": fa4, "cudnn_sdpa": cudnn_sdpa, "aten": aten}
