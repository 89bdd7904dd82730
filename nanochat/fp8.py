"""Float8 matrix products in training, for Hopper and later: half the bytes and twice the peak of bfloat16.

A float8 number has few bits for its size and fewer for its digits, so a tensor is first divided by one
number, its scale, that puts its largest element at the end of the range ("tensorwise"); a product is
multiplied by the two scales again. There are two kinds (arXiv:2209.05433): e4m3, 3 bits of mantissa, up
to 448, for weights and activations, and e5m2, 2 bits, up to 57344, for gradients, which spread wider.
Scales are taken anew from each tensor, so nothing is kept between steps and nothing can go stale.

>>> if (why := unsupported_reason(device, dtype)) is None:
...     convert(model)

swaps the class of the Linears in the blocks whose two sizes are multiples of 16 and at least MIN_WIDTH, and leaves
alone what they hold: parameters, optimizer groups and checkpoints are the same. The head stays as it is, inside its
loss. Float8 is for gradients: while they are off, evaluation and sampling run as in a model that was never converted,
to the bit. Inputs and outputs are of any compute dtype. With float16 the loss scale is absorbed by the tensors' scales,
and an overflow comes out as nan for it to see.

Casts are plain operations in an autograd.Function and no custom op: the compiler sees through it, takes the
largest element while it writes a norm or a ReLU, casts once what q, k and v all read, and keeps for the backward
pass only the scales of what it can cast again. Weights are cast from float32 in every pass. At d24 that moves some
9 GB, 3 ms on an H100, while a pass of 32 rows takes some 400: a copy for all passes of a step is not worth its upkeep.

What is to be gained, by arithmetic for an H100 (not measured): a square product of width d saves 6 d^2 FLOP at 700
against 1200 TFLOP/s per token, and moves 13 d bytes more at 3.3 TB/s. Even at d = 1100; the wider, the better.
"""

from __future__ import annotations

import torch

from nanochat.gpt import GPT, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_WIDTH = 128  # a narrower product is never worth the casts
MIN_AMAX = 1e-30  # for tensors of zeros; divided by 57344 it is still a normal float32, which no GPU takes for zero


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x as (float8 numbers of x's shape, float32 scale of shape ()): x is about the one times the other.

    Nothing finite leaves the range, so there is nothing to clamp. What is not finite comes out as nan, to be seen.
    """
    scale = x.abs().amax().float().clamp(min=MIN_AMAX) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product(a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a (M, K) times the transpose of b (N, K): (M, N), summed up in float32.

    Hopper's float8 units want both with K innermost; who passes a transposed view pays for a copy of one byte
    per element. K and N must be multiples of 16. `use_fast_accum` would drop bits of the sums (arXiv:2412.19437, 3.3.2).
    """
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)


class Float8Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> (M, N) in the dtype of x. What waits for the backward pass is float8 as well."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, scale_x = to_float8(x, E4M3)
        w8, scale_w = to_float8(weight, E4M3)
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        return product(x8, scale_x, w8, scale_w, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        g8, scale_g = to_float8(grad, E5M2)  # (M, N)
        d_x = product(g8, scale_g, w8.t(), scale_w, grad.dtype)  # (M, K)
        d_weight = product(g8.t(), scale_g, x8.t(), scale_x, torch.float32)  # (N, K), not rounded on its way to the master
        return d_x, d_weight


class Float8Linear(Linear):
    """A Linear whose product and gradients are float8 while gradients are on."""

    def forward(self, x):
        rows = x.numel() // x.size(-1)
        if not torch.is_grad_enabled() or rows % 16:  # the weight's gradient sums over the rows
            return super().forward(x)
        return Float8Product.apply(x.reshape(rows, -1), self.weight).view(*x.shape[:-1], -1)


def pays(linear: Linear) -> bool:
    """Whether float8 is possible (multiples of 16) and large enough to gain from."""
    return all(size % 16 == 0 and size >= MIN_WIDTH for size in linear.weight.shape)


def convert(model: GPT) -> int:
    """Make the large Linears of the model's blocks, and no other, float8; returns how many."""
    linears = [linear for linear in model.transformer.h.modules() if isinstance(linear, Linear) and pays(linear)]
    for linear in linears:
        linear.__class__ = Float8Linear
    return len(linears)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there can be no float8 products of `dtype` on `device`; None where some were tried and came out right."""
    needs = "float8 needs an NVIDIA GPU of compute capability 8.9 or more (such as H100, H200, L40S)"
    if device.type != "cuda":
        return f"{needs}, and this is a {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"{needs}; {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    try:
        error = trial(device, dtype)
    except Exception as problem:  # torch._scaled_mm is not public: whatever it says is to be shown, not to end the run
        return f"float8 products fail here: {type(problem).__name__}: {problem}".splitlines()[0]
    return None if error < 0.1 else f"float8 products are wrong here, by {error:.0%}"


@torch.enable_grad()
def trial(device: torch.device, dtype: torch.dtype) -> float:
    """The worst relative error of a small product and its two gradients against float64; some 6% are float8's own."""
    rng = torch.Generator(device).manual_seed(0)  # of its own: a run draws the same numbers with and without float8
    sizes = (64, 128), (256, 128), (64, 256)
    x, weight, grad = (torch.randn(*size, dtype=torch.float64, device=device, generator=rng) for size in sizes)
    low_x, low_weight = x.to(dtype).requires_grad_(), weight.float().requires_grad_()
    y = Float8Product.apply(low_x, low_weight)
    y.backward(grad.to(dtype))
    pairs = [(y, x @ weight.t()), (low_x.grad, grad @ weight), (low_weight.grad, grad.t() @ x)]
    return max(((low - exact).norm() / exact.norm()).item() for low, exact in pairs)
