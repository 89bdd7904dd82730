"""How long to train, in what batches, and how rates move: plain arithmetic, no torch.

One model is the reference point: depth 12, for which the starting rates were tuned. Larger
and smaller runs are derived from it.
"""

from __future__ import annotations

import math

from nanochat.common import UserError

D12_SCALING_PARAMS = 12 * 12 * 768**2 + 32768 * 768  # matrices and head of the depth-12 model
D12_TOKENS = 12 * D12_SCALING_PARAMS  # its horizon at 12 tokens per scaling parameter
D12_BATCH = 2**19  # tokens per step that suit that horizon


def horizon_tokens(target_flops: float, target_param_data_ratio: float, flops_per_token: int, scaling_params: int) -> int:
    """Tokens to train on: from a budget of FLOPs where one is given, else tokens per scaling parameter."""
    if target_flops > 0:
        return int(target_flops / flops_per_token)
    if target_param_data_ratio > 0:
        return int(target_param_data_ratio * scaling_params)
    raise UserError("nothing says how long to train: set --num-iterations, --target-flops or --target-param-data-ratio")


def best_batch_size(tokens: int) -> int:
    """Tokens per step for a horizon: 2^19 at depth 12's, growing with its 0.383th power, to a power of two.

    The exponent is that of "Power Lines" (arXiv:2505.13738). `best_batch_size(D12_TOKENS)` -> 524288.
    """
    return 2 ** round(math.log2(D12_BATCH * (tokens / D12_TOKENS) ** 0.383))


def micro_batches(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per step, over all ranks. Rank r takes those numbered r, r + world_size, ...

    They need not come out even among the ranks. UserError, naming sizes that work, when the batch is no
    multiple of a micro-batch, or when there is not one for every rank.
    """
    unit = device_batch_size * sequence_len
    if total_batch_size % unit or total_batch_size < unit:
        lower, upper = total_batch_size // unit * unit, -(-total_batch_size // unit) * unit
        nearest = " or ".join(str(size) for size in sorted({lower, upper}) if size)
        raise UserError(
            f"--total-batch-size {total_batch_size} is not a multiple of the {unit} tokens that one pass takes "
            f"({device_batch_size} rows x {sequence_len} tokens); use {nearest}"
        )
    if total_batch_size < unit * world_size:
        smaller = total_batch_size // sequence_len // world_size
        raise UserError(
            f"--total-batch-size {total_batch_size} is {total_batch_size // unit} pass(es) of {device_batch_size} rows x "
            f"{sequence_len} tokens, too few for {world_size} ranks; use --total-batch-size {unit * world_size}"
            + (f" or --device-batch-size {smaller}" if smaller else "")
        )
    return total_batch_size // unit


def batch_lr_scale(total_batch_size: int) -> float:
    """Learning rates go with the square root of the batch (arXiv:2205.10287 for Adam)."""
    return (total_batch_size / D12_BATCH) ** 0.5


def short_run_lr_scale(tokens: int, scaling_params: int) -> float:
    """A run shorter than 12 tokens per scaling parameter wants higher rates: (full horizon / tokens)^0.32.

    The exponent is that of "Scaling Optimal LR Across Token Horizons" (arXiv:2409.19913); its effect on
    runs of minutes is in dev/LOG.md. 1 for a full horizon and beyond.
    """
    return max(1.0, 12 * scaling_params / tokens) ** 0.32


def weight_decay_scale(total_batch_size: int, tokens: int) -> float:
    """Weight decay goes with sqrt(batch) / horizon: what is forgotten per run stays the same."""
    return batch_lr_scale(total_batch_size) * D12_TOKENS / tokens


def lr_multiplier(step: int, progress: float, warmup_steps: int, warmdown: float, final: float) -> float:
    """Trapezoid: up over the first steps, flat, then down to `final`.

    `progress` in [0, 1] is the share of the run that is done before this step, and the
    multiplier falls over the last `warmdown` of it.
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
