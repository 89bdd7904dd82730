"""Training speed on this machine, against a peer and against the floor, in one run.

    python -m dev.bench.train                                    # depth 4, vocabulary 32768, 8 rows of 512 tokens
    python -m dev.bench.train --depth 6 --vocab-size 8192

Each variant runs in a process of its own, so that its peak memory is its own:
    ours       the training step as the scripts run it, compiled
    eager      the same, uncompiled
    peer       the same model and optimizer with the textbook loss: all logits at once, F.cross_entropy
The floor is the time that the step's matrix products alone would take at the rate measured here for
products whose operands stay in cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from dev.bench.model import build


def build_with_optimizer(args):
    from nanochat.optim import MuonAdamW

    model = build(args.depth, args.sequence_len, args.vocab_size, "cpu")
    return model, MuonAdamW(model.param_groups())


def measure(args) -> dict:
    """Median seconds per step and peak memory of one variant; random tokens cost what real ones do."""
    import torch
    import torch.nn.functional as F

    from nanochat.common import Compute
    from nanochat.device import compile_model
    from nanochat.training import train_step

    compute = Compute(torch.device("cpu"), torch.float32)
    model, optimizer = build_with_optimizer(args)
    step_model = compile_model(model, compute, args.rows) if args.variant == "ours" else model
    if args.variant == "peer":

        def step_model(x, y, loss_reduction):
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=loss_reduction)

    tokens = torch.randint(0, args.vocab_size, (2, args.rows, args.sequence_len))
    batch = [(tokens[0].int(), tokens[1])]
    started = time.perf_counter()
    train_step(step_model, optimizer, batch, compute)
    first = time.perf_counter() - started
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        loss = train_step(step_model, optimizer, batch, compute).item()
        times.append(time.perf_counter() - started)
    assert loss > 0
    times.sort()
    return {
        "seconds": times[len(times) // 2], "best": times[0], "first": first, "flops_per_token": model.estimate_flops(),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def product_rate() -> float:
    """FLOP/s of a matrix product with operands that stay in cache."""
    import torch

    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(50):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * 1024 * 1024 / best


def main(argv=None):
    parser = argparse.ArgumentParser(description="Training speed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--sequence-len", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--variant", choices=["ours", "eager", "peer"], help="measure this one here and print JSON")
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(measure(args)))
        return

    results = {}
    for variant in ("ours", "eager", "peer"):
        command = [sys.executable, "-m", "dev.bench.train", "--variant", variant]
        for name in ("depth", "vocab_size", "sequence_len", "rows", "steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{variant} failed:\n{run.stderr}")
        results[variant] = json.loads(run.stdout.splitlines()[-1])
    tokens, rate = args.rows * args.sequence_len, product_rate()
    floor = tokens * results["ours"]["flops_per_token"] / rate
    print(f"products in cache: {rate / 1e9:.0f} GFLOP/s; floor {floor:.2f} s per step of {tokens} tokens = {tokens / floor:,.0f} tok/s")
    print(f"{'variant':8s} {'s/step':>7s} {'tok/s':>7s} {'x peer':>7s} {'of floor':>9s} {'peak GB':>8s} {'first step s':>13s}")
    for variant, r in results.items():
        seconds = r["seconds"]
        print(f"{variant:8s} {seconds:7.2f} {tokens / seconds:7,.0f} {results['peer']['seconds'] / seconds:7.2f} "
              f"{floor / seconds:9.0%} {r['peak_gb']:8.2f} {r['first']:13.1f}")


if __name__ == "__main__":
    main()
