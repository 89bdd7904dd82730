"""What several ranks cost: the bandwidth between ranks, and how training scales from one core to two.

    torchrun --nproc-per-node=8 -m dev.bench.ranks      # bandwidth; on several nodes: on each, as training is started
    python -m dev.bench.ranks                           # scaling on this machine, one rank against two

Bandwidth is "bus bandwidth" as nccl-tests defines it (doc/PERFORMANCE.md): the bytes that each rank sends, divided by the
time. It does not depend on the number of ranks, so it can be compared with that of the hardware.

Scaling pins each rank to its own core and alternates three kinds of step, so that other load slows all of them alike: one
rank with two micro-batches while the other waits; two ranks with one micro-batch each, as torchrun trains; and two ranks
with two micro-batches each that exchange nothing. The last is the upper bound set by this machine's memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from nanochat.common import UserError, compute_cleanup, compute_init, print0, ranks, run_script


def main(argv=None):
    parser = argparse.ArgumentParser(description="What several ranks cost.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device-type", default="", help="for bandwidth: cuda or cpu (default: cuda if available)")
    parser.add_argument("--scaling", action="store_true", help="under torchrun: measure scaling instead of bandwidth")
    parser.add_argument("--tiny", action="store_true", help="scaling of a small model: depth 2, vocabulary 2048, rows of 128 tokens")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    args = parser.parse_args(argv)
    if ranks()[2] == 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dev.bench.ranks"]
        sys.exit(subprocess.run([*command, "--scaling", f"--steps={args.steps}", *["--tiny"] * args.tiny]).returncode)
    if not args.scaling:
        bandwidth(args.device_type)
    elif ranks()[2] != 2:
        raise UserError(f"--scaling compares one rank with two, but there are {ranks()[2]}; use torchrun --nproc-per-node=2")
    else:
        depth, vocab_size, sequence_len = (2, 2048, 128) if args.tiny else (4, 32768, 512)
        scaling(argparse.Namespace(depth=depth, vocab_size=vocab_size, sequence_len=sequence_len, rows=4, steps=args.steps))


def bandwidth(device_type: str) -> None:
    """Print the bus bandwidth in GB/s of three collectives for messages of growing size."""
    import torch
    import torch.distributed as dist

    from nanochat.optim import all_gather, reduce_scatter  # the ones that training uses

    compute = compute_init(device_type)
    n = compute.world_size
    sent = {"reduce-scatter": (n - 1) / n, "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}  # share of the message, per rank
    print0(f"bus bandwidth in GB/s among {n} ranks ({compute.device.type})")
    print0(f"{'MB':>6s}" + "".join(f"{name:>16s}" for name in sent))
    for megabytes in (1, 4, 16, 64, 256, 1024)[: 6 if compute.device.type == "cuda" else 5]:
        shard = torch.zeros(megabytes * 2**20 // 4 // n, device=compute.device)
        whole = torch.zeros(shard.numel() * n, device=compute.device)
        collectives = {
            "reduce-scatter": lambda: reduce_scatter(shard, whole)(),
            "all-gather": lambda: all_gather(whole, shard)(),
            "all-reduce": lambda: dist.all_reduce(whole),
        }
        row = f"{megabytes:6d}"
        for name, collective in collectives.items():
            seconds_of(collective, 2, compute)  # the first call connects the ranks
            repeat = min(100, max(3, int(0.5 / seconds_of(collective, 1, compute))))
            row += f"{whole.numel() * 4 * sent[name] / seconds_of(collective, repeat, compute) / 1e9:16.2f}"
        print0(row)
    compute_cleanup(compute)


def seconds_of(work, repeat: int, compute) -> float:
    """Seconds per call of `work` on the slowest rank; all ranks start together."""
    import torch

    compute.barrier()
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return max(compute.gather(time.perf_counter() - started)) / repeat


def scaling(args) -> None:
    """Time the three kinds of step on two ranks and print them on rank 0."""
    import torch

    from dev.bench.train import build_with_optimizer
    from nanochat.common import Compute
    from nanochat.device import compile_model
    from nanochat.training import train_step

    rank = ranks()[0]
    if hasattr(os, "sched_setaffinity"):  # before any thread is started, since threads inherit it
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    alone = Compute(torch.device("cpu"), torch.float32)
    solo_model, solo_optimizer = build_with_optimizer(args)  # before compute_init: an optimizer that exchanges nothing
    compute = compute_init("cpu")
    torch.set_num_threads(1)
    model, optimizer = build_with_optimizer(args)
    solo_model, model = compile_model(solo_model, alone, args.rows), compile_model(model, compute, args.rows)
    tokens = torch.randint(0, args.vocab_size, (2, 2, args.rows, args.sequence_len))  # (inputs or targets, micro-batch, B, T)
    batches = [(tokens[0, i].int(), tokens[1, i]) for i in (0, 1)]

    steps = {
        "one rank": lambda: rank == 0 and train_step(solo_model, solo_optimizer, batches, alone),
        "two ranks": lambda: train_step(model, optimizer, [batches[rank]], compute),
        "two ranks that exchange nothing": lambda: train_step(solo_model, solo_optimizer, batches, alone),
    }
    seconds = {name: [] for name in steps}
    for repeat in range(-2, args.steps):  # the first two compile and warm up
        for name, step in steps.items():
            elapsed = seconds_of(step, 1, compute)
            if repeat >= 0:
                seconds[name].append(elapsed)
    one, two, separate = (median(seconds[name]) for name in steps)

    step_tokens = 2 * args.rows * args.sequence_len  # of a step of "one rank" or "two ranks"
    parameters = sum(p.numel() for p in model.parameters())
    print0(f"depth {args.depth}, vocabulary {args.vocab_size}, {parameters / 1e6:.1f}M parameters; medians of {args.steps} steps")
    print0(f"one rank:  {one:.3f} s, {step_tokens / one:,.0f} tok/s\ntwo ranks: {two:.3f} s, {step_tokens / two:,.0f} tok/s")
    efficiency, ceiling = one / two / 2, one / separate
    print0(f"efficiency {efficiency:.1%}; ceiling {ceiling:.1%} (two ranks that exchange nothing)")
    compute_cleanup(compute)


if __name__ == "__main__":
    run_script(main)
