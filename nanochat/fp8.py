"""Float8 matrix products in training, for Hopper and later: half the bytes and twice the peak rate of bfloat16.

A float8 number has a small range and few digits, so a tensor is first divided by one number, its scale, that maps its
largest element to the end of the range ("tensorwise" scaling); a product is multiplied by both scales. There are two
formats (arXiv:2209.05433): e4m3, 3 bits of mantissa, up to 448, for weights and activations, and e5m2, 2 bits, up to
57344, for gradients, which have a wider range. Scales are computed from each tensor, so no state is kept between steps.

`convert` swaps the class of the eligible Linears in the blocks, so parameters, optimizer groups and checkpoints stay the
same. The head is not converted, since it is part of its loss. While gradients are off, a converted model computes
exactly what it did before. With float16 an overflow becomes nan, which the loss scale detects.

Casts are plain operations in an autograd.Function, not a custom op, so the compiler can fuse the maximum into the norm
or ReLU before it, cast the common input of q, k and v once, and recompute casts in the backward pass.

Expected gain, computed for an H100 and not measured: a square product of width d saves 6 d^2 FLOP per token at 700
against 1200 TFLOP/s, and moves 13 d more bytes at 3.3 TB/s. Both are equal at d = 1100; wider products gain.
"""

from __future__ import annotations

import torch

from nanochat.gpt import GPT, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_WIDTH = 128  # narrower products never gain
MIN_AMAX = 1e-30  # for tensors of zeros; divided by 57344 it is still a normal float32, which GPUs do not flush to zero


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 tensor of x's shape, float32 scale of shape ()), whose product is about x.

    Finite values stay within the range, so nothing is clamped. Values that are not finite become nan.
    """
    scale = x.abs().amax().float().clamp(min=MIN_AMAX) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product(
    a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, fast: bool = False
) -> torch.Tensor:
    """a (M, K) times the transpose of b (N, K): (M, N), accumulated in float32.

    Hopper's float8 units need K innermost in both; a transposed view is copied. K and N must be multiples of 16.
    `fast` drops bits of the sums (arXiv:2412.19437, section 3.3.2), which is bearable for activations, not for gradients.
    """
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)


class Float8Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> (M, N) in the dtype of x. The tensors saved for the backward pass are float8, too."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, scale_x = to_float8(x, E4M3)
        w8, scale_w = to_float8(weight, E4M3)
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        return product(x8, scale_x, w8, scale_w, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        g8, scale_g = to_float8(grad, E5M2)  # (M, N)
        d_x = product(g8, scale_g, w8.t(), scale_w, grad.dtype)  # (M, K)
        d_weight = product(g8.t(), scale_g, x8.t(), scale_x, torch.float32)  # (N, K), as precise as the weight
        return d_x, d_weight


class Float8Linear(Linear):
    """A Linear whose product and gradients are float8 while gradients are on."""

    def multiply(self, x, weight):
        rows = x.numel() // x.size(-1)
        if not torch.is_grad_enabled() or rows % 16 or weight.size(0) % 16:  # the weight's gradient sums over the rows
            return super().multiply(x, weight)
        return Float8Product.apply(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)


def eligible(linear: Linear) -> bool:
    """Whether both sizes are multiples of 16, as float8 products require, and at least MIN_WIDTH."""
    return all(size % 16 == 0 and size >= MIN_WIDTH for size in linear.weight.shape)


def convert(model: GPT) -> int:
    """Make the eligible Linears of the model's blocks float8, in place; returns their number."""
    linears = [linear for linear in model.transformer.h.modules() if isinstance(linear, Linear) and eligible(linear)]
    for linear in linears:
        linear.__class__ = Float8Linear
    return len(linears)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why float8 products of `dtype` do not work on `device`; None if a self test passes."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"float8 needs an NVIDIA GPU of compute capability 8.9 or more (such as H100, H200, L40S), and this is a {name}"
    try:
        error = self_test(device, dtype)
    except Exception as problem:  # torch._scaled_mm is not public and may fail in any way; the run can do without it
        return f"float8 products fail here: {type(problem).__name__}: {problem}".splitlines()[0]
    return None if error < 0.1 else f"float8 products are wrong here, by {error:.0%}"


@torch.enable_grad()
def self_test(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a small product and its two gradients against float64; about 6% is normal."""
    rng = torch.Generator(device).manual_seed(0)  # a separate one, so that the run's random numbers do not change
    sizes = (64, 128), (256, 128), (64, 256)
    x, weight, grad = (torch.randn(*size, dtype=torch.float64, device=device, generator=rng) for size in sizes)
    low_x, low_weight = x.to(dtype).requires_grad_(), weight.float().requires_grad_()
    y = Float8Product.apply(low_x, low_weight)
    y.backward(grad.to(dtype))
    pairs = [(y, x @ weight.t()), (low_x.grad, grad @ weight), (low_weight.grad, grad.t() @ x)]
    return max(((low - exact).norm() / exact.norm()).item() for low, exact in pairs)
