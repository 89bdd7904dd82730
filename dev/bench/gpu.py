"""One GPU, checked and measured in one command of under nine minutes.

    python -m dev.bench.gpu --out gpu.json              # on a Hopper GPU
    python -m dev.bench.gpu --device cpu --tiny         # the same code in a minute, so that it cannot rot

First whether it computes what it should (attention, loss, compiled step, float8 and engine against slower
and more exact ways), then how fast: the chip's two ceilings, attention by backend, training by depth, reading
and writing, and a short race to a low loss. Every section is tried by itself: one that fails is told of and the
others go on. The table comes last, and everything stands in the JSON file.

Text is the built-in corpus, two bytes a token, so no tokenizer is needed and bits per byte are exact. Weights are
random. Times are medians of repeated runs after warm-up, taken by CUDA's own events on a GPU. MFU counts as PaLM does
(GPT.estimate_flops) against the bf16 peak of the data sheet; bandwidth is of bytes that must move at least.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

from dev.bench.model import build

VOCAB = 65536  # pairs of bytes


class Text:
    """The built-in corpus as rows of tokens, in a fixed random order; the last hundredth is for validation."""

    def __init__(self, context: int, characters: int, device):
        import numpy as np
        import torch

        from nanochat.sample_world import documents

        data = "\n\n".join(documents(size=characters)).encode()
        pairs = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2").astype(np.int32)
        rows = torch.from_numpy(pairs[: len(pairs) // (context + 1) * (context + 1)]).view(-1, context + 1)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(device)
        held = max(1, len(rows) // 100)
        self.train, self.val, self.place = rows[:-held], rows[-held:], 0

    def batch(self, rows: int):
        index = [(self.place + i) % len(self.train) for i in range(rows)]
        self.place += rows
        taken = self.train[index]
        return taken[:, :-1].contiguous(), taken[:, 1:].long()


def seconds_of(work, device, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of one call of `work`."""
    import torch

    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def error(found, expected) -> float:
    """Relative error in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# -----------------------------------------------------------------------------
# Is it right?


def check_attention(args, device, dtype) -> dict:
    """Forward and gradients of what each backend makes of windows and grouped heads, against float64."""
    import torch

    found = {}
    T, window = (256, 128) if args.tiny else (2048, 512)
    torch.manual_seed(1)
    shapes = [(2, T, heads, 128) for heads in (4, 2, 2)]
    leaves = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], device=device).to(dtype)
    exact = [x.double().requires_grad_() for x in leaves]
    for left in (window, -1):
        expected = exact_attention(*exact, left)
        gradients = torch.autograd.grad((expected * weight.double()).sum(), exact)
        for name, attend in backends(device, dtype, left).items():
            inputs = [x.clone().requires_grad_() for x in leaves]
            y = attend(*inputs, left)
            ours = torch.autograd.grad((y * weight).sum(), inputs)
            errors = [error(y, expected), *map(error, ours, gradients)]
            found[f"{name} {'full' if left < 0 else 'window'}"] = require(max(errors), 2e-2 if dtype == torch.bfloat16 else 1e-4)
    return found


def backends(device, dtype, left: int) -> dict:
    """name -> function (q, k, v, left) of every way to attend that runs and is right on this machine; says why others do not."""
    from nanochat import flash_attention
    from nanochat.attention_backends import order
    from nanochat.common import UserError

    found = {}
    for name in ("sdpa", *(order(device) if device.type == "cuda" else ())):
        flash_attention._override_impl = name
        try:
            flash_attention.choose(device, dtype, 4, 2, 128, left)
            found[name] = attend_by(name)
        except UserError as reason:
            print(f"  {reason}")
        finally:
            flash_attention._override_impl = None
    return found


def attend_by(name: str):
    from nanochat import flash_attention

    def attend(q, k, v, left):
        flash_attention._override_impl = name
        try:
            return flash_attention.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
        finally:
            flash_attention._override_impl = None

    return attend


def exact_attention(q, k, v, left: int):
    import torch

    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(-1))
    i, j = torch.arange(q.size(1), device=q.device)[:, None], torch.arange(q.size(1), device=q.device)
    hidden = (j > i) | ((j < i - left) if left >= 0 else False)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def require(value: float, most: float) -> float:
    if not value <= most:  # NaN is not
        raise AssertionError(f"an error of {value:.3g} where {most:.3g} is allowed")
    return value


def check_loss(args, device, dtype) -> dict:
    """The chunked loss and its gradients, plain and compiled, against float64 on whole logits."""
    import torch
    import torch.nn.functional as F

    from nanochat.cross_entropy import SOFTCAP, linear_cross_entropy

    N, d, V = (512, 64, 512) if args.tiny else (16384, 1280, 32768)
    torch.manual_seed(2)
    hidden, weight = torch.randn(N, d, device=device).to(dtype), torch.randn(V, d, device=device) * 0.05
    targets = torch.randint(-1, V, (N,), device=device)
    # float64 logits are large, so they are made for a part of the tokens at a time
    loss, d_hidden, d_weight = 0.0, [], torch.zeros(V, d, device=device, dtype=torch.float64)
    for h, t in zip(hidden.split(2048), targets.split(2048)):
        h, w = h.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
        part = F.cross_entropy(SOFTCAP * torch.tanh(h @ w.T / SOFTCAP), t, ignore_index=-1, reduction="sum")
        part.backward()
        loss, d_weight = loss + part.item(), d_weight + w.grad
        d_hidden.append(h.grad)
    found = {}
    for name, function in {"eager": linear_cross_entropy, "compiled": torch.compile(linear_cross_entropy, dynamic=False)}.items():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        ours = function(h, w, targets)
        ours.backward()
        errors = [abs(ours.item() / loss - 1), error(h.grad, torch.cat(d_hidden)), error(w.grad, d_weight)]
        found[name] = require(max(errors), 1e-2 if dtype == torch.bfloat16 else 1e-4)
    return found


def check_step(args, device, dtype) -> dict:
    """Loss and gradients of a compiled model against the same model uncompiled, and the engine's answer against the naive one."""
    import torch

    from dev.bench.engine import NoTokenizer
    from nanochat.device import prepare_for_inference
    from nanochat.engine import Engine

    depth, T = (2, 128) if args.tiny else (8, 1024)
    model = build(depth, T, VOCAB, device, dtype, noise=True)
    x, y = Text(T, 200_000, device).batch(4)
    losses, gradients = [], []
    for run in (model, torch.compile(model, dynamic=False)):
        model.zero_grad()
        losses.append(run(x, y))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    found = {"compiled loss": require(abs(losses[1].item() / losses[0].item() - 1), 1e-3),
             "compiled gradients": require(error(gradients[1], gradients[0]), 5e-2 if dtype == torch.bfloat16 else 1e-3)}  # fmt: skip
    exact = build(depth, T, VOCAB, device, torch.float32, noise=True)  # in bfloat16 equally likely tokens may change places
    prompt, precision = x[0, : T // 4].tolist(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    naive = list(exact.generate(prompt, 16, temperature=0.0))
    (row,), _ = Engine(exact, NoTokenizer()).generate_batch(prompt, max_tokens=16, temperature=0.0)
    torch.set_float32_matmul_precision(precision)
    if row[len(prompt) :] != naive:
        raise AssertionError(f"the engine says {row[len(prompt):]}, the model {naive}")
    return {**found, "engine": "says what the model says"}


def check_float8(args, device, dtype) -> dict:
    """The loss after some steps in float8 and in the compute dtype, on the same text."""
    losses = {}
    for name in ("bf16", "fp8"):
        run = Training(args, 2 if args.tiny else 8, 4, device, dtype, float8=name == "fp8", context=128 if args.tiny else 1024)
        losses[name] = statistics.mean([run.step() for _ in range(10 if args.tiny else 60)][-5:])
    require(abs(losses["fp8"] / losses["bf16"] - 1), 0.02)
    return losses


# -----------------------------------------------------------------------------
# How fast?


def measure_ceilings(args, device, dtype) -> dict:
    """What the chip itself gives: bytes per second of a copy, read and written, and FLOP/s of a large product."""
    import torch

    n = 512 if args.tiny else 8192
    source = torch.randn(2**20 if args.tiny else 2**30, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = seconds_of(lambda: a @ b, device)
    return {"copy GB/s": 2 * source.nbytes / copy / 1e9, "product TFLOP/s": 2 * n**3 / product / 1e12}


def measure_attention(args, device, dtype) -> dict:
    """TFLOP/s, forward and forward with backward, of each backend; the positions that are seen are what is counted."""
    import torch

    B, T, heads, window = (1, 256, 2, 128) if args.tiny else (16, 2048, 10, 512)
    found = {}
    q, k, v = (torch.randn(B, T, heads, 128, device=device).to(dtype).requires_grad_() for _ in range(3))
    for left in (window, -1):
        seen = T * (T + 1) / 2 if left < 0 else T * (left + 1) - left * (left + 1) / 2
        flops = 4 * B * heads * 128 * seen
        for name, attend in backends(device, dtype, left).items():
            forward = seconds_of(lambda: attend(q, k, v, left), device)
            both = seconds_of(lambda: torch.autograd.grad(attend(q, k, v, left).sum(), (q, k, v)), device)
            rates = {"forward TFLOP/s": flops / forward / 1e12, "both TFLOP/s": 3.5 * flops / both / 1e12}
            found[f"{name} {'full' if left < 0 else 'window'}"] = rates
    return found


class Training:
    """What base_train does in a step, on one device: compiled model, optimizer, real text."""

    def __init__(self, args, depth: int, rows: int, device, dtype, float8: bool = False, context: int = 2048, **rates):
        import torch

        from nanochat.common import Compute
        from nanochat.optim import MuonAdamW
        from nanochat.device import compile_model
        from nanochat.training import freeze_garbage

        torch.manual_seed(0)
        self.compute, self.rows, self.context = Compute(device, dtype), rows, context
        self.model = build(depth, context, VOCAB, device, dtype)
        if float8:
            from nanochat import fp8

            fp8.convert(self.model)
        self.optimizer = MuonAdamW(self.model.param_groups(**rates))
        self.compiled = compile_model(self.model, self.compute, rows)
        self.text = Text(context, 300_000 if args.tiny else 30_000_000, device)
        freeze_garbage()

    def step(self, read: bool = True):
        from nanochat.training import train_step

        loss = train_step(self.compiled, self.optimizer, [self.text.batch(self.rows)], self.compute, count=self.rows * self.context)
        return loss.item() if read else loss


def measure_training(args, device, dtype) -> dict:
    """Tokens per second, MFU, memory and the optimizer's share, by depth, in bf16 and float8, at the most rows that fit."""
    import torch

    from nanochat.device import peak_flops

    found = {}
    for depth, rows in ((2, 4),) if args.tiny else ((12, 32), (20, 32), (24, 32)):
        for float8 in (False, True):
            name = f"d{depth} {'fp8' if float8 else 'bf16'}"
            while rows:
                try:
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                    run = Training(args, depth, rows, device, dtype, float8, 128 if args.tiny else 2048)
                    seconds = seconds_of(lambda: run.step(read=False), device, repeats=3 if args.tiny else 8)
                    break
                except torch.OutOfMemoryError:
                    rows //= 2
                run = None
                torch.cuda.empty_cache()
            gradients = [torch.randn_like(p) for p in run.model.parameters()]

            def update():
                for p, gradient in zip(run.model.parameters(), gradients):
                    p.grad = gradient
                run.optimizer.step()

            optimizer = seconds_of(update, device, repeats=3 if args.tiny else 8)
            rate, peak = rows * run.context / seconds, peak_flops(device)
            found[name] = {
                "rows": rows, "computes again": run.model.recompute, "tok/s": rate, "MFU": peak and rate * run.model.estimate_flops() / peak,
                "optimizer of a 2^19-token step": optimizer / (optimizer + (seconds - optimizer) * 2**19 / (rows * run.context)),
                "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            }  # fmt: skip
            del run, gradients
            if device.type == "cuda":
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    return found


def measure_loader(args, device, dtype) -> dict:
    """Tokens per second that the data loader can make, tokenizer and packing included, as far as there is a tokenizer."""
    import tempfile

    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.sample_world import documents, write_shards
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(documents(size=1_000_000), 2048 if args.tiny else 8192)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, size=1_000_000 if args.tiny else 10_000_000)
        B, T = (4, 128) if args.tiny else (32, 2048)
        batches = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, B, T, "train", device=device, source=folder)
        n = 20 if args.tiny else 60
        for _ in range(n // 3):
            next(batches)
        started = time.perf_counter()
        for _ in range(n):
            next(batches)
        rate = n * B * T / (time.perf_counter() - started)
        batches.close()
    return {"tok/s": rate}


def measure_engine(args, device, dtype) -> dict:
    """Reading and writing of a d20: tokens per second, and the share of the copy's bandwidth that must be moved at least."""
    import torch

    from dev.bench.engine import NoTokenizer, prompts, read_ours, write_ours
    from nanochat.device import prepare_for_inference
    from nanochat.engine import Engine

    depth, length = (2, 64) if args.tiny else (20, 512)
    model = build(depth, 256 if args.tiny else 2048, 512 if args.tiny else 32768, device, dtype, noise=True).eval()
    model = prepare_for_inference(model)
    read_ours(model, length, 0)  # kernels are loaded
    found = {"reading tok/s": max(read_ours(model, length, seed) for seed in range(3))}
    ceiling = measure_ceilings(args, device, dtype)["copy GB/s"]
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name and "wte" not in name)
    config, tokens = model.config, 16 if args.tiny else 128
    for batch in (1, 2) if args.tiny else (1, 8, 32, 128):
        engine = Engine(model, NoTokenizer(), max_sequences=batch)
        if engine.max_sequences < batch:
            found[f"writing {batch}"] = f"there is room for {engine.max_sequences} rows only"
            break
        for prompt in prompts(batch, length, config.vocab_size):
            engine.submit(prompt, max_tokens=tokens + 40, temperature=0.0)
        while engine.num_running < batch:
            engine.step()
        for _ in range(5):  # graphs are captured
            engine.step()
        started = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = (time.perf_counter() - started) / tokens
        span = sum(min(w, length) if w >= 0 else length for w in model.window_sizes)
        moved = weights + batch * span * 2 * config.n_kv_head * 128 * model.transformer.wte.weight.element_size()
        found[f"writing {batch}"] = {"tok/s": batch / seconds, "of bandwidth": moved / seconds / 1e9 / ceiling}
        del engine
    sampled = write_ours(model, 2 if args.tiny else 8, length, tokens, 0.8, 0)
    return {**found, "writing 8, sampled tok/s": sampled}


def measure_race(args, device, dtype) -> dict:
    """Bits per byte of a d8 on held-out text after --seconds of training, compilation left out."""
    import torch

    from nanochat.training import set_rates

    context, rows = (128, 4) if args.tiny else (1024, 32)
    run = Training(args, 2 if args.tiny else 8, rows, device, dtype, context=context)
    run.step()  # compiles
    started, steps, seconds = time.perf_counter(), 0, 3 if args.tiny else args.seconds
    while (spent := time.perf_counter() - started) < seconds:
        set_rates(run.optimizer, steps, spent / seconds, 20, 0.5, 0.05)
        run.step()
        steps += 1
    with torch.no_grad():
        parts = [run.model(val[:, :-1].contiguous(), val[:, 1:].long()).item() for val in run.text.val.split(8)]
    return {"bits per byte": statistics.mean(parts) / math.log(2) / 2, "steps": steps, "tokens": steps * rows * context}


# -----------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where")
    parser.add_argument("--tiny", action="store_true", help="small sizes: does every line still run?")
    parser.add_argument("--only", action="append", metavar="SECTION", help="sections whose names contain this; may be repeated")
    parser.add_argument("--seconds", type=float, default=150, help="length of the race")
    parser.add_argument("--out", help="write everything to this JSON file")
    args = parser.parse_args(argv)

    import torch

    from nanochat.common import compute_dtype, compute_init

    device = compute_init(args.device).device
    dtype = compute_dtype(args.device)
    card = torch.cuda.get_device_name(device) if args.device == "cuda" else platform.processor() or "CPU"
    results = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), "dtype": str(dtype)}
    print(results, flush=True)
    sections = [check_attention, check_loss, check_step, check_float8, measure_ceilings, measure_attention, measure_training,
                measure_loader, measure_engine, measure_race]  # fmt: skip
    failed = []
    for section in sections:
        name = section.__name__.replace("_", " ")
        if args.only and not any(part in name for part in args.only):
            continue
        started = time.perf_counter()
        try:
            results[name] = section(args, device, dtype)
        except Exception as fault:
            results[name] = f"FAILED: {type(fault).__name__}: {fault}"
            failed.append(name)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1, default=str) + "\n")
    for name, found in results.items():
        for what, value in found.items() if isinstance(found, dict) else [("", found)]:
            print(f"{name:18s} {what:28s} {show(value)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def show(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {show(item)}" for key, item in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
