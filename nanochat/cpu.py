"""What makes PyTorch fast and repeatable on a CPU, applied from outside of the model.

Decoding: `pack` swaps the classes of a model's layers for ones that use oneDNN's weight layout.
Training: `deterministic` makes the compiled backward pass repeat bit for bit.
Both: `keep_freed_memory`. Figures are in dev/LOG.md, 11 and 16.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, Attention, Linear

MIN_ROWS = 4  # a product with fewer rows takes longer than with this many
MIN_WEIGHTS = 2**16  # smaller matrices gain nothing


def keep_freed_memory() -> None:
    """Tell glibc, where it is used, to keep freed memory instead of returning it to the system.

    By default a block of megabytes, such as a tensor, is returned and allocated again for every operation, and the
    system clears each page first, which can take longer than the operation.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def deterministic() -> None:
    """Make compiled training repeat bit for bit.

    Otherwise threads add the gradients of the embeddings in an order that changes from run to run.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


@torch.no_grad()
def pack(model: GPT) -> None:
    """Give the matrices a second copy in oneDNN's layout, if this CPU has AVX and the model runs in float32.

    The copies are used while gradients are off and the weights are unchanged; call `pack` again after an update.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return
    if model.transformer.wte.weight.dtype != torch.float32:
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = PackedAttention
            module.packed_qkv = PackedWeights(module.c_q, module.c_k, module.c_v)
        elif isinstance(module, Linear) and module.weight.numel() >= MIN_WEIGHTS:
            module.__class__ = PackedLinear
            module.packed = PackedWeights(module)


class PackedWeights:
    """Products of one input with one or several weights, two to four times as fast as PyTorch's for few rows."""

    def __init__(self, *linears: Linear):
        self.weights = [linear.weight for linear in linears]
        self.versions = [weight._version for weight in self.weights]
        self.layout = torch.ops.mkldnn._reorder_linear_weight(torch.cat(self.weights), 16)  # for about 16 rows

    @property
    def usable(self) -> bool:
        return not torch.is_grad_enabled() and self.versions == [weight._version for weight in self.weights]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.size(-1)
        if rows < MIN_ROWS:
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, MIN_ROWS - rows))
            return self(padded)[:rows].view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.layout, None, "none", [], "")


class PackedLinear(Linear):
    def forward(self, x):
        return self.packed(x) if self.packed.usable else super().forward(x)


class PackedAttention(Attention):
    def project(self, x):
        if not self.packed_qkv.usable:
            return super().project(x)
        B, T, _ = x.shape
        return self.packed_qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)
