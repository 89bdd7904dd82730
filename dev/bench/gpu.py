"""One GPU, checked and measured in one command of a few minutes.

    python -m dev.bench.gpu --out gpu.json              # on a GPU
    python -m dev.bench.gpu --device cpu --tiny         # every line at toy size on a CPU
    python -m dev.bench.gpu --only attention            # sections whose names contain a word

    ceilings    memory bandwidth and matmul rate of the device
    attention   each back end: error against float64, FLOP rate
    step        the compiled step against an eager one without the chunked loss; the engine against the naive loop
    float8      the loss after some steps, in float8 and in the compute dtype
    training    tokens per second, MFU and memory by depth, in both
    loader      tokens per second of the document loader
    engine      prefill and decoding: tokens per second, share of the bandwidth

A section that fails is reported and the others run. Text is the built-in corpus with two bytes per token, so no
tokenizer is needed; weights are random. Times are means after warm-up (torch.utils.benchmark). MFU uses
GPT.estimate_flops and the bf16 peak of the data sheet.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from unittest.mock import patch

from dev.bench.engine import NoTokenizer, bytes_per_step, decode_rate, prefill_rate
from dev.bench.train import build, loader_rate
from nanochat import flags

VOCAB = 65536  # pairs of bytes


def rows_of_text(context: int, characters: int, device):
    """The built-in corpus in a fixed random order: int32 token ids (rows, context + 1)."""
    import numpy as np
    import torch

    from nanochat.sample_world import documents

    data = "\n\n".join(documents(size=characters)).encode()
    tokens = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2").astype(np.int32)
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
                if flash_attention.choose(device, dtype, 4, 2, 128, left) == name:  # else it has printed why not
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
    compiled = compile_model(model, compute, rows)
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


def training(args, device, dtype) -> dict:
    """Tokens per second, MFU, peak memory and the optimizer's share, by depth, in bf16 and float8, at the most rows that fit."""
    import torch

    from nanochat.device import peak_flops

    results, peak, repeats = {}, peak_flops(device), 3 if args.tiny else 8
    for depth, rows, context in ((2, 4, 128),) if args.tiny else ((12, 32, 2048), (20, 32, 2048), (24, 32, 2048)):
        for fp8 in (False, True):
            model = optimizer = step = seconds = None  # frees the previous model
            while seconds is None:
                try:
                    model, optimizer, step = trainer(args, depth, rows, context, device, dtype, fp8)
                    seconds = seconds_of(step, repeats)
                except torch.OutOfMemoryError:
                    model = optimizer = step = None
                    rows //= 2
                    torch.cuda.empty_cache()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            update, rate = seconds_of(optimizer.step, repeats), rows * context / seconds
            accumulated = (seconds - update) * 2**19 / (rows * context)  # of the micro-batches of a 2^19-token step
            measured = {
                "rows": rows, "recompute": model.recompute, "tok/s": rate, "MFU": peak and rate * model.estimate_flops() / peak,
                "optimizer of a 2^19-token step": update / (update + accumulated),
            }  # fmt: skip
            if device.type == "cuda":
                measured["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
                torch.cuda.reset_peak_memory_stats(device)
                torch._dynamo.reset()
            results[f"d{depth} {'fp8' if fp8 else 'bf16'}"] = measured
    return results


def loader(args, device, dtype) -> dict:
    return {"tok/s": loader_rate(4, 128, device, 2048, 1, 20) if args.tiny else loader_rate(32, 2048, device)}


def engine(args, device, dtype) -> dict:
    """Prefill and decoding of a d20: tokens per second, and the bytes that must be read as a share of the copy's bandwidth."""
    depth, context, vocab_size, length, steps = (2, 256, 512, 64, 16) if args.tiny else (20, 2048, 32768, 512, 128)
    model = build(depth, context, vocab_size, device, dtype, noise=True)
    bandwidth = ceilings(args, device, dtype)["copy GB/s"] * 1e9
    results = {"prefill": {"tok/s": max(prefill_rate(model, length, seed) for seed in range(3))}}
    for batch in (1, 2) if args.tiny else (1, 8, 32, 128):
        rate = decode_rate(model, batch, length, steps, seed=0)
        read = bytes_per_step(model, batch, length + steps // 2)
        results[f"decode {batch}"] = {"tok/s": rate, "of bandwidth": read * rate / batch / bandwidth}
    results["decode 8, sampled"] = {"tok/s": decode_rate(model, 8, length, steps, seed=0, temperature=0.8)}
    return results


SECTIONS = (ceilings, attention, step, float8, training, loader, engine)


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
    for section in SECTIONS:
        name = section.__name__
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
