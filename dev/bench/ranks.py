"""What several ranks cost: the network's bandwidth, and how training scales from one core to two.

    torchrun --nproc-per-node=8 -m dev.bench.ranks      # bandwidth; on several nodes: on each, as training is started
    python -m dev.bench.ranks                           # scaling on this machine, one rank against two

Bandwidth is told as "bus bandwidth", as nccl-tests do (its doc/PERFORMANCE.md): what every rank sends, divided by the time.
It does not depend on the number of ranks, so it compares with what the hardware can do.

Scaling pins each rank to a core of its own and lets three kinds of step take turns, so that a busy
neighbour slows all of them: one rank with two passes while the other waits; two ranks with one pass
each, as torchrun trains; and two ranks with two passes each that do not speak to each other. The last is the
ceiling: what two cores of this machine give together when nothing is exchanged.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from statistics import median

from nanochat.common import UserError, compute_cleanup, compute_init, print0, ranks, run_script


def bandwidth(device_type: str) -> None:
    """Print GB/s of bus bandwidth of the three exchanges, for messages of growing size."""
    import torch
    import torch.distributed as dist

    from nanochat.optim import all_gather, reduce_scatter  # as training does them

    compute = compute_init(device_type)
    n = compute.world_size
    sent = {"reduce-scatter": (n - 1) / n, "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}  # by a rank, of the message
    print0(f"bus bandwidth in GB/s among {n} ranks ({compute.device.type})")
    print0(f"{'MB':>6s}" + "".join(f"{name:>16s}" for name in sent))
    for megabytes in (1, 4, 16, 64, 256, 1024)[: 6 if compute.device.type == "cuda" else 5]:
        part = torch.zeros(megabytes * 2**20 // 4 // n, device=compute.device)
        whole = torch.zeros(part.numel() * n, device=compute.device)
        work = {
            "reduce-scatter": lambda: reduce_scatter(part, whole)(),
            "all-gather": lambda: all_gather(whole, part)(),
            "all-reduce": lambda: dist.all_reduce(whole),
        }
        row = f"{megabytes:6d}"
        for name, exchange in work.items():
            seconds_of(exchange, 2, compute)  # connections are made at the first use
            repeat = min(100, max(3, int(0.5 / seconds_of(exchange, 1, compute))))
            row += f"{whole.numel() * 4 * sent[name] / seconds_of(exchange, repeat, compute) / 1e9:16.2f}"
        print0(row)
    compute_cleanup(compute)


def seconds_of(work, repeat: int, compute) -> float:
    """Seconds that `work` takes, on the slowest rank; all ranks begin together."""
    import torch

    compute.barrier()
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return max(compute.gather(time.perf_counter() - started)) / repeat


def scaling(args) -> None:
    """One of the two ranks of the comparison: measures, and prints it on rank 0."""
    import torch

    from dev.bench.train import build_with_optimizer
    from nanochat.common import Compute
    from nanochat.optim import Bucket, MuonAdamW
    from nanochat.device import compile_model
    from nanochat.training import train_step

    rank = ranks()[0]
    if hasattr(os, "sched_setaffinity"):  # before any thread is started, which takes over what is set here
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    alone = Compute(torch.device("cpu"), torch.float32)
    solo_model, solo_optimizer = build_with_optimizer(args)  # before the ranks have met: an optimizer that exchanges nothing
    compute = compute_init("cpu")
    torch.set_num_threads(1)
    model, optimizer = build_with_optimizer(args)
    solo_model, model = compile_model(solo_model, alone, args.rows), compile_model(model, compute, args.rows)
    tokens = torch.randint(0, args.vocab_size, (2, 2, args.rows, args.sequence_len))
    batches = [(tokens[0, i].int(), tokens[1, i]) for i in (0, 1)]

    spent = Counter()  # seconds of this step by method
    for owner, name in ((MuonAdamW, "step"), (Bucket, "scatter"), (Bucket, "gradients"), (Bucket, "gather"), (Bucket, "finish")):
        setattr(owner, name, timed(getattr(owner, name), name, spent))

    def one():
        if rank == 0:
            train_step(solo_model, solo_optimizer, batches, alone)

    steps = {
        "one rank": one,
        "two ranks": lambda: train_step(model, optimizer, [batches[rank]], compute),
        "two apart": lambda: train_step(solo_model, solo_optimizer, batches, alone),
    }
    seen = {name: [] for name in steps}
    for repeat in range(-2, args.steps):  # the first two compile and warm up
        for name, step in steps.items():
            spent.clear()
            total = seconds_of(step, 1, compute)
            if repeat >= 0:
                seen[name].append({"all": total, "forward and backward": total - spent["step"], **phases(spent)})
    times = {name: {phase: median(s[phase] for s in each) for phase in each[0]} for name, each in seen.items()}

    step_tokens = 2 * args.rows * args.sequence_len
    speed = {name: step_tokens / times[name]["all"] for name in ("one rank", "two ranks")}
    parameters = sum(p.numel() for p in model.parameters())
    print0(f"depth {args.depth}, vocabulary {args.vocab_size}, {parameters / 1e6:.1f}M parameters, {2 * args.rows} rows of "
           f"{args.sequence_len} tokens per step; medians of {args.steps} steps, seconds on rank 0")
    print0(f"{'':28s}{'one rank':>10s}{'two ranks':>10s}")
    for phase in times["one rank"]:
        print0(f"{phase:28s}{times['one rank'][phase]:10.3f}{times['two ranks'][phase]:10.3f}")
    print0(f"{'tok/s':28s}{speed['one rank']:10,.0f}{speed['two ranks']:10,.0f}")
    efficiency, ceiling = speed["two ranks"] / speed["one rank"] / 2, times["one rank"]["all"] / times["two apart"]["all"]
    print0(f"efficiency {efficiency:.1%}; ceiling {ceiling:.1%} (two ranks that exchange nothing); {efficiency / ceiling:.1%} of it")
    compute_cleanup(compute)


def timed(method, name: str, spent: Counter):
    def wrapper(*args):
        started = time.perf_counter()
        result = method(*args)
        spent[name] += time.perf_counter() - started
        return result

    return wrapper


def phases(spent: Counter) -> dict[str, float]:
    return {
        "gradients into buffers": spent["scatter"],
        "waiting for reduce-scatter": spent["gradients"],
        "update": spent["step"] - sum(spent[name] for name in ("scatter", "gradients", "gather", "finish")),
        "weights into buffers": spent["gather"],
        "all-gather and back": spent["finish"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description="What several ranks cost.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device-type", default="", help="of the bandwidth: cuda or cpu (empty: the best there is)")
    parser.add_argument("--scaling", action="store_true", help="under torchrun: scaling instead of bandwidth")
    parser.add_argument("--tiny", action="store_true", help="scaling of a small model: depth 2, vocabulary 2048, rows of 128 tokens")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    args = parser.parse_args(argv)
    args.depth, args.vocab_size, args.sequence_len = (2, 2048, 128) if args.tiny else (4, 32768, 512)
    args.rows = 4  # per pass
    if ranks()[2] == 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dev.bench.ranks"]
        sys.exit(subprocess.run([*command, "--scaling", f"--steps={args.steps}", *["--tiny"] * args.tiny]).returncode)
    if not args.scaling:
        bandwidth(args.device_type)
    elif ranks()[2] != 2:
        raise UserError(f"--scaling compares one rank with two, but there are {ranks()[2]}; use torchrun --nproc-per-node=2")
    else:
        scaling(args)


if __name__ == "__main__":
    run_script(main)
