"""Fitting a model to its device: compilation, the attention kernel, the micro-batch, the peak FLOP rate."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress

import torch

from nanochat.common import Compute, UserError, print0
from nanochat.flash_attention import choose
from nanochat.schedule import largest_device_batch

# Dense bf16 peak in FLOP/s by words of the device's name; the first match counts. From NVIDIA's and AMD's data sheets (B200 and
# B300 on an HGX board), for RTX cards from the white papers on GA102, Ada and RTX Blackwell, with float32 accumulation.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
    "MI300A": 981e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "5090": 209.5e12,
    "4090": 165e12,
    "3090": 71e12,
    "A6000": 155e12,
}
OTHER_CHIPS = {"D", "Ti", "Laptop", "MIG"}  # words that name another chip, or a part of this one
SAVED_VALUES = 16.1  # per token, layer and channel, that the compiled model saves for the backward pass (dev/LOG.md, 23)


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s; None where it is unknown, so that no MFU is reported."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """The bf16 peak of the GPU that PyTorch calls so, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(name.replace("-", " ").split())
    matches = [flops for known, flops in PEAK_FLOPS.items() if words.issuperset(known.split())]
    return matches[0] if matches and not words & OTHER_CHIPS else None


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held, in bytes: GPU memory allocated by PyTorch; on a CPU, its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Tell glibc, where it is used, to keep freed memory instead of returning it to the system (dev/LOG.md, 11).

    By default a block of megabytes, such as a tensor, is returned and allocated again for every operation, and the
    system clears each page first, which can take longer than the operation.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_model(model: torch.nn.Module, compute: Compute) -> torch.nn.Module:
    """The compiled model; the model itself, with a printed reason, where that is impossible."""
    choose_attention(model, compute)
    if compute.device.type not in ("cpu", "cuda"):
        return model
    print0("compiling the model, which takes half a minute or more the first time")
    if fault := next(filter(None, compute.gather(compiler_fault(compute.device))), None):  # all ranks alike
        print0(f"training uncompiled and more slowly, since the compiler does not work: {fault}")
        return model
    if compute.device.type == "cpu":
        keep_freed_memory()
        # Otherwise threads add the gradients of the embeddings in an order that changes from run to run
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model, dynamic=False)


def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled here (no compiler or headers, a cache folder that is full or noexec, ...), in one line.

    UserError if PyTorch's compiler cannot even be imported, as our operators need it, too.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except OSError as error:
        raise UserError(f"PyTorch cannot create its cache: {error}; set TORCHINDUCTOR_CACHE_DIR to a writable folder") from error
    except Exception as error:  # whatever the compiler and its tools raise
        reason = str(error).split("Output:\n")[-1].split("\n\nSet TORCH")[0]  # between the command and advice on debugging
        return " ".join(reason.split())[:300]


def choose_attention(model: torch.nn.Module, compute: Compute) -> None:
    """Choose the attention kernel for the model. Must happen outside of compiled code."""
    config = model.config
    choose(compute.device, compute.dtype, (config.n_head, config.n_kv_head, config.n_embd // config.n_head))


def fit_device_batch(model, compute: Compute, total_batch_size: int) -> int:
    """Rows per micro-batch: a power of two that divides the rows of a step, at most 8 on a CPU.

    On a GPU at most 32, and as many as fit on every rank, by what a compiled step takes (dev/LOG.md, 23).
    """
    config, on_gpu = model.config, compute.device.type == "cuda"
    rows = largest_device_batch(total_batch_size, config.sequence_len, compute.world_size, limit=32 if on_gpu else 8)
    if not on_gpu:
        return rows
    weights = sum(p.nbytes for p in model.parameters())
    # Gradients and weights in the compute dtype, this rank's share of the optimizer state, and the logits of a chunk
    fixed = (1.5 + 2 / compute.world_size) * weights + 2.5e9
    per_row = config.sequence_len * config.n_layer * config.n_embd * SAVED_VALUES * compute.dtype.itemsize
    torch.cuda.empty_cache()  # so that the driver knows what is free
    free = 0.95 * torch.cuda.mem_get_info(compute.device)[0]
    while rows and fixed + rows * per_row > free:
        rows //= 2
    rows = min(compute.gather(rows))
    if rows == 0:
        raise UserError(
            f"one row takes {(fixed + per_row) / 1e9:.1f} GB and {free / 1e9:.1f} GB of this GPU's memory are free; "
            "use a smaller --depth or --max-seq-len"
        )
    return rows
