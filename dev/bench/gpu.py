"""One GPU, checked and measured in one command of a few minutes.

    python -m dev.bench.gpu --out gpu.json              # on a GPU
    python -m dev.bench.gpu --device cpu --tiny         # every line at toy size on a CPU
    python -m dev.bench.gpu --only attention            # sections whose names contain a word

    ceilings    memory bandwidth and matmul rate of the device
    attention   each back end: error against float64, FLOP rate
    step        the compiled step against an eager one without the chunked loss; the engine against the naive loop
    float8      the loss after some steps, in float8 and in the compute dtype
    training dN tokens per second, MFU and memory at depth N, in both for the deepest
    engine      prefill and decoding: tokens per second, share of the bandwidth

A section takes minutes at most; one that fails is reported and the others run. Text is the built-in corpus with two
bytes per token, so no tokenizer is needed; weights are random. Times are means after warm-up (torch.utils.benchmark).
MFU uses GPT.estimate_flops and the bf16 peak of the data sheet; "MFU of a pass" is what is predicted (dev/LOG.md, 23).
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

from dev.bench.engine import NoTokenizer, bytes_per_step, decode_rate, prefill_rate
from dev.bench.train import build
from nanochat import flags

VOCAB = 49152  # pairs of bytes, modulo this number
PREDICTED = {  # by depth
    12: "0.432 on an H100, 0.474 on an H200",
    20: "0.499 on an H100, 0.535 on an H200",
    24: "0.507 on an H100, 0.549 on an H200",
}


def rows_of_text(context: int, characters: int, device):
    """The built-in corpus in a fixed random order: int32 token ids (rows, context + 1)."""
    import numpy as np
    import torch

    from nanochat.sample_world import documents

    data = "\n\n".join(documents(size=characters)).encode()
    tokens = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2").astype(np.int32) % VOCAB
    rows = torch.from_numpy(tokens[: len(tokens) // (context + 1) * (context + 1)]).view(-1, context + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(device)


def seconds_of(work, repeats: int = 10) -> float:
    """Mean seconds of one call of `work` after warm-up, the device synchronised."""
    import torch
    from torch.utils.benchmark import Timer

    return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).timeit(repeats).mean


def error(actual, expected) -> float:
    """Relative error in the Frobenius norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def require(value: float, limit: float) -> float:
    if not value <= limit:  # true for NaN
        raise AssertionError(f"an error of {value:.3g}, more than {limit:.3g}")
    return value


def ceilings(args, device, dtype) -> dict:
    """Bytes per second of a copy, read and written, and FLOP/s of a large product."""
    import torch

    n = 512 if args.tiny else 8192
    source = torch.randn(2**20 if args.tiny else 2**30, device=device)
    target, a, b = torch.empty_like(source), *(torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return {"copy GB/s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / 1e9,
            "matmul TFLOP/s": 2 * n**3 / seconds_of(lambda: a @ b) / 1e12}  # fmt: skip


def attention(args, device, dtype) -> dict:
    """Each back end with grouped heads: error of output and gradients against float64, TFLOP/s forward and with backward.

    The FLOP rate counts unmasked positions only. A back end that cannot be used is named with its reason.
    """
    import torch
    import torch.nn.functional as F

    from nanochat import flash_attention

    B, T, heads, window = (1, 256, 2, 128) if args.tiny else (16, 2048, 10, 512)
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, T, h, 128, device=device).to(dtype).requires_grad_() for h in (heads, heads // 2, heads // 2))
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    results = {}

    def measure(left):
        attend = lambda: flash_attention.flash_attn_func(q, k, v, True, (left, 0))
        first = [x[:1].detach().double().requires_grad_() for x in (q, k, v)]
        visible = (j <= i) & (j >= i - (left if left >= 0 else T))  # (T, T)
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in first), attn_mask=visible, enable_gqa=True).transpose(1, 2)
        gradients = torch.autograd.grad(expected.square().sum(), first)
        y = attend()
        actual = torch.autograd.grad(y.float().square().sum(), (q, k, v))
        worst = max(error(y[:1], expected), *(error(g[:1], exact) for g, exact in zip(actual, gradients)))
        flops = 4 * B * heads * 128 * visible.sum().item()
        return {
            "error": require(worst, 3e-2 if dtype == torch.bfloat16 else 1e-4),
            "forward TFLOP/s": flops / seconds_of(attend) / 1e12,
            "with backward": 3.5 * flops / seconds_of(lambda: torch.autograd.grad(attend().sum(), (q, k, v))) / 1e12,
        }

    for name in ("sdpa", "fa3", "aten"):
        for kind, left in (("window", window), ("full", -1)):
            with patch.object(flash_attention, "_override_impl", name):
                if flash_attention.choose(device, dtype, (heads, heads // 2, 128)) == name:  # else it has printed why not
                    results[f"{name} {kind}"] = measure(left)
    return results


def step(args, device, dtype) -> dict:
    """Loss and gradients of the compiled model against the eager one with all logits at once; the engine against the naive loop."""
    import torch
    import torch.nn.functional as F

    from nanochat.engine import Engine

    depth, T = (2, 128) if args.tiny else (8, 1024)
    model, rows = build(depth, T, VOCAB, device, dtype, noise=True), rows_of_text(T, 200_000, device)[:4]
    inputs, targets, compiled = rows[:, :-1].contiguous(), rows[:, 1:].long(), torch.compile(model, dynamic=False)
    losses, gradients = [], []
    for loss in (lambda: F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten()), lambda: compiled(inputs, targets)):
        model.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    loss_error, gradient_error = abs(losses[1].item() / losses[0].item() - 1), error(gradients[1], gradients[0])

    # In full float32: in bfloat16 the order of nearly equal logits may change
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact, prompt = build(depth, T, VOCAB, device, torch.float32, noise=True), inputs[0, : T // 4].tolist()
    naive = list(exact.generate(prompt, 16, temperature=0.0))
    (tokens,), _ = Engine(exact, NoTokenizer()).generate_batch(prompt, max_tokens=16, temperature=0.0)
    torch.set_float32_matmul_precision(precision)
    if tokens[len(prompt) :] != naive:
        raise AssertionError(f"the engine generates {tokens[len(prompt):]}, the naive loop {naive}")
    return {"loss": require(loss_error, 1e-3), "gradients": require(gradient_error, 5e-2 if dtype == torch.bfloat16 else 1e-3),
            "engine": "equal to the naive loop"}  # fmt: skip


def trainer(args, depth: int, rows: int, context: int, device, dtype, fp8: bool):
    """(model, optimizer, a function that trains on the next rows of text and returns the loss), as in base_train."""
    from nanochat.common import Compute
    from nanochat.device import compile_model
    from nanochat.fp8 import convert
    from nanochat.optim import MuonAdamW
    from nanochat.training import train_step

    model, compute = build(depth, context, VOCAB, device, dtype), Compute(device, dtype)
    if fp8:
        convert(model)
    optimizer = MuonAdamW(model.param_groups())
    compiled = compile_model(model, compute)
    batches = itertools.cycle(rows_of_text(context, 300_000 if args.tiny else 10_000_000, device).split(rows)[:-1])

    def step():
        text = next(batches)  # (rows, context + 1)
        inputs, targets = text[:, :-1].contiguous(), text[:, 1:].long()
        return train_step(compiled, optimizer, [(inputs, targets)], compute, count=targets.numel())

    return model, optimizer, step


def float8(args, device, dtype) -> dict:
    """The loss after some steps in float8 and in the compute dtype, on the same text."""
    losses = {}
    for name in ("bf16", "fp8"):
        _, _, step = trainer(args, *((2, 4, 128) if args.tiny else (8, 4, 1024)), device, dtype, name == "fp8")
        steps = [step().item() for _ in range(10 if args.tiny else 60)]
        losses[name] = require(statistics.mean(steps[-5:]), steps[0])
    require(abs(losses["fp8"] / losses["bf16"] - 1), 0.02)
    return losses


def training(args, device, dtype, depth: int, kinds: tuple[str, ...]) -> dict:
    """Tokens per second, MFU, peak memory and the optimizer's share, in bf16 or float8, at the most rows that fit."""
    import torch

    from nanochat.common import Compute
    from nanochat.device import fit_device_batch, peak_flops

    results, peak, repeats = {}, peak_flops(device) or float("nan"), 3 if args.tiny else 8
    depth, context = (2, 128) if args.tiny else (depth, 2048)
    for kind in kinds:
        model = optimizer = step = None  # frees the previous model
        rows = fit_device_batch(build(depth, context, VOCAB, device, dtype), Compute(device, dtype), 2**19)
        model, optimizer, step = trainer(args, depth, rows, context, device, dtype, kind == "fp8")
        seconds = seconds_of(step, repeats)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        update = seconds_of(optimizer.step, repeats)
        accumulated = (seconds - update) * 2**19 / (rows * context)  # of the micro-batches of a 2^19-token step
        useful = rows * context * model.estimate_flops() / peak  # seconds
        measured = {
            "rows": rows,
            "tok/s": rows * context / seconds,
            "MFU": useful / seconds,
            "MFU of a pass": useful / (seconds - update),
            "predicted": PREDICTED.get(depth),
            "optimizer of a 2^19-token step": update / (update + accumulated),
        }
        if device.type == "cuda":
            measured["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
            torch._dynamo.reset()
        results[kind] = measured
    return results


def engine(args, device, dtype) -> dict:
    """Prefill and decoding of a d20: tokens per second, and the bytes that must be read as a share of the copy's bandwidth."""
    depth, context, lengths, steps = (2, 256, (64, 50), 16) if args.tiny else (20, 2048, (512, 1000), 128)
    model = build(depth, context, VOCAB, device, dtype, noise=True)
    bandwidth = ceilings(args, device, dtype)["copy GB/s"] * 1e9
    results = {f"prefill {n}": {"tok/s": max(prefill_rate(model, n, seed) for seed in range(3))} for n in lengths}
    batches = (1, 2) if args.tiny else (1, 8, 32, 128)
    for compiled in (False, True):
        for batch in batches if compiled else batches[:1]:
            rate = decode_rate(model, batch, lengths[0], steps, seed=0, compiled=compiled, temperature=0.8)
            read = bytes_per_step(model, batch, lengths[0] + steps // 2)
            name = f"decode {batch}{', compiled' if compiled else ''}"
            results[name] = {"tok/s": rate, "of bandwidth": read * rate / batch / bandwidth}
    return results


SECTIONS = {
    "ceilings": ceilings,
    "attention": attention,
    "step": step,
    "float8": float8,
    "training d12": partial(training, depth=12, kinds=("bf16",)),
    "training d20": partial(training, depth=20, kinds=("bf16",)),
    "training d24": partial(training, depth=24, kinds=("bf16", "fp8")),
    "engine": engine,
}


def show(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {show(item)}" for key, item in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="device to measure")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that every line runs")
    parser.add_argument("--only", action="append", metavar="WORD", help="sections whose names contain this; may be repeated")
    parser.add_argument("--out", help="write everything to this JSON file")
    args = parser.parse_args(argv)

    import torch

    from nanochat.common import compute_dtype, compute_init

    device, dtype = compute_init(args.device).device, compute_dtype(args.device)
    card = torch.cuda.get_device_name(device) if args.device == "cuda" else platform.processor() or "CPU"
    results = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), "dtype": str(dtype)}
    print(results, flush=True)
    failed = []
    for name, section in SECTIONS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        start = time.perf_counter()
        try:
            results[name] = section(args, device, dtype)
        except Exception as fault:
            results[name] = {"FAILED": f"{type(fault).__name__}: {fault}"}
            failed.append(name)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        for key, value in results[name].items():
            print(f"    {key:20s} {show(value)}")
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1, default=str) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
