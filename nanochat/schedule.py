"""How long to train, in which batches, at which rates: plain arithmetic, no torch.

The reference point is the model of depth 12, for which the base rates were tuned. `plan` derives the
horizon, batch size and rates of a pretraining run of any other size from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanochat.common import UserError

D12_SCALING_PARAMS = 12 * 12 * 768**2 + 32768 * 768  # matrices and head of the depth-12 model
D12_TOKENS = 12 * D12_SCALING_PARAMS  # its horizon at 12 tokens per scaling parameter
D12_BATCH = 2**19  # tokens per step at that horizon
FULL_SOFTMAX = 0.07  # the last part of a run on a CPU, whose loss takes the whole vocabulary (dev/LOG.md, 21)


def check_batch(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per step over all ranks. Rank r computes those numbered r, r + world_size, ...

    Raises UserError, naming sizes that work, unless the total batch is a multiple of a micro-batch with at least one
    for every rank. The ranks need not get equally many.
    """
    unit = device_batch_size * sequence_len
    least = unit * world_size
    if total_batch_size % unit or total_batch_size < least:
        below = total_batch_size // unit * unit
        nearest = [size for size in (below, below + unit) if size >= least] or [least]
        raise UserError(
            f"--total-batch-size {total_batch_size} is not a multiple of the {unit} tokens of a micro-batch "
            f"({device_batch_size} rows x {sequence_len} tokens), or holds less than one for each of {world_size} rank(s); "
            f"use {' or '.join(map(str, nearest))}, or another --device-batch-size"
        )
    return total_batch_size // unit


def largest_device_batch(total_batch_size: int, sequence_len: int, world_size: int, limit: int) -> int:
    """The largest power of two up to `limit` rows that divides the rows of a step and leaves every rank a micro-batch."""
    rows, size = total_batch_size // sequence_len, 1
    while 2 * size <= limit and rows % (2 * size) == 0 and rows // (2 * size) >= world_size:
        size *= 2
    return size


def batch_lr_scale(total_batch_size: int) -> float:
    """Learning rates scale with the square root of the batch size (arXiv:2205.10287 for Adam)."""
    return (total_batch_size / D12_BATCH) ** 0.5


@dataclass(frozen=True)
class Plan:
    """A pretraining run in numbers."""

    num_iterations: int
    total_batch_size: int  # tokens per step
    warmup_steps: int
    lr_scale: float  # factor of all learning rates
    short_run: float  # factor of those of matrices and embeddings, which later stages keep
    weight_decay: float  # of the matrices

    @property
    def tokens(self) -> int:
        return self.num_iterations * self.total_batch_size


def plan(
    flops_per_token: int, scaling_params: int, sequence_len: int, *, num_iterations: int = -1, target_flops: float = -1.0,
    target_param_data_ratio: float = 12.0, total_batch_size: int = -1, warmup_steps: int = 40, weight_decay: float = 0.28,
) -> Plan:  # fmt: skip
    """Horizon, batch size and rates of a pretraining run; the keyword arguments are base_train's flags, -1 where not set.

    Depends neither on the number of ranks nor on the device batch size.
    """
    # The horizon in tokens sets the batch size and the number of steps, where these are not given
    if total_batch_size <= 0 or num_iterations <= 0:
        if target_flops > 0:
            horizon = int(target_flops / flops_per_token)
        elif target_param_data_ratio > 0:
            horizon = int(target_param_data_ratio * scaling_params)
        else:
            raise UserError("no length of training: give --num-iterations, --target-flops or --target-param-data-ratio")
    if total_batch_size <= 0:
        # The exponent is from "Power Lines" (arXiv:2505.13738)
        best = 2 ** round(math.log2(D12_BATCH * (max(1, horizon) / D12_TOKENS) ** 0.383))
        total_batch_size = max(1, round(best / sequence_len)) * sequence_len
    if num_iterations <= 0:
        num_iterations = max(1, round(horizon / total_batch_size))
    tokens = num_iterations * total_batch_size

    # A run of less than 12 tokens per scaling parameter needs higher rates. The exponent is that of "Scaling Optimal LR
    # Across Token Horizons" (arXiv:2409.19913); its effect on runs of minutes is in dev/LOG.md.
    short_run = max(1.0, 12 * scaling_params / tokens) ** 0.32
    # Weight decay scales with sqrt(batch) / horizon, so that the total decay of a run stays the same
    decay_scale = batch_lr_scale(total_batch_size) * D12_TOKENS / tokens
    return Plan(
        num_iterations=num_iterations,
        total_batch_size=total_batch_size,
        warmup_steps=min(warmup_steps, num_iterations // 20),
        lr_scale=batch_lr_scale(total_batch_size),
        short_run=short_run,
        weight_decay=weight_decay * decay_scale / short_run,
    )


# -----------------------------------------------------------------------------
# Rates during a run


def lr_multiplier(step: int, progress: float, warmup_steps: int, warmdown: float, final: float) -> float:
    """Trapezoid: linear warmup, constant, then linear decay to `final`.

    `progress` in [0, 1] is the share of the run that is done before this step; the multiplier
    falls over the last `warmdown` of the run.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if progress > 1 - warmdown:
        return final + (1 - final) * (1 - min(progress, 1.0)) / warmdown
    return 1.0


def muon_momentum(step: int, progress: float, warmdown: float, ramp_steps: int = 400) -> float:
    """0.85 -> 0.97 over the first steps, then -> 0.90 during the warmdown."""
    momentum = 0.85 + 0.12 * min(step / max(ramp_steps, 1), 1.0)
    if progress > 1 - warmdown:
        momentum += (0.90 - momentum) * (progress - (1 - warmdown)) / warmdown
    return momentum


def weight_decay_multiplier(progress: float) -> float:
    """Cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
