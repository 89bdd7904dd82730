"""Speed of prefill and decoding, against Hugging Face's `generate`, in one run.

    python -m dev.bench.engine                      # depth 4, vocabulary 32768, batches of 1, 4, 16, 64
    python -m dev.bench.engine --depth 12 --batch 1 --batch 16

    ours     Engine.submit and Engine.step
    hf       GPT-2 of transformers with the same width, depth, heads and vocabulary, in float32, with its own cache

Greedy decoding with random weights; all prompts differ, so the prefix cache does not help. The memory floor of a decoding
step is the time to read every weight once, and of each sequence the keys and values its layers attend to, at the bandwidth
measured by summing a large tensor. Each figure is the best of the repetitions.
"""

from __future__ import annotations

import random
import timeit

from dev.bench.train import build
from nanochat import flags


class NoTokenizer:
    """Special tokens outside the vocabulary, so sequences end at their limit only."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def prompts(n: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(n)]


def prefill_rate(model, length: int, seed: int) -> float:
    """Tokens per second of one prompt until its first token is sampled."""
    from nanochat.engine import Engine

    engine = Engine(model, NoTokenizer(), max_sequences=1)
    warmup, prompt = prompts(2, length, model.config.vocab_size, seed)  # the first allocates the cache
    engine.generate_batch(warmup, max_tokens=1)
    return length / timeit.timeit(lambda: engine.generate_batch(prompt, max_tokens=1), number=1)


def decoding_engine(model, batch: int, length: int, seed: int, temperature: float = 0.0, compiled: bool = False):
    """An engine in which `batch` sequences are decoding."""
    from nanochat.engine import Engine

    engine = Engine(model, NoTokenizer(), max_sequences=batch, compiled=compiled)
    for i, prompt in enumerate(prompts(batch, length, model.config.vocab_size, seed)):
        engine.submit(prompt, temperature=temperature, top_k=50, seed=i)
    while engine.num_running < batch:
        engine.step()
    timeit.timeit(engine.step, number=3)  # on a GPU, graphs are captured
    return engine


def decode_rate(model, batch: int, length: int, steps: int, seed: int, **settings) -> float:
    """Tokens per second of all sequences together; for `settings` see `decoding_engine`."""
    engine = decoding_engine(model, batch, length, seed, **settings)
    seconds = timeit.timeit(engine.step, number=steps)
    assert engine.num_running == batch
    return batch * steps / seconds


def profile(model, batch: int, length: int, steps: int) -> str:
    """Shares of the time of a sampled decoding step on a CPU, by kind, while PyTorch's profiler runs, which slows small operations."""
    import torch

    engine = decoding_engine(model, batch, length, seed=0, temperature=0.8)
    with torch.profiler.profile() as profiler:
        seconds = timeit.timeit(engine.step, number=steps)
    times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    shares = {
        "products": sum(time for name, time in times.items() if "linear" in name or name.endswith("mm")),
        "attention": sum(time for name, time in times.items() if "attention" in name),
        "outside of operations": seconds - sum(times.values()),
    }
    shares["other operations"] = seconds - sum(shares.values())
    return ", ".join(f"{kind} {time / seconds:.0%}" for kind, time in shares.items())


def build_hf(config, device):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.sequence_len, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(gpt2).eval().to(device)


def hf_rates(hf, batch: int, length: int, steps: int, seed: int) -> tuple[float, float]:
    """(prefill, decoding) tokens per second, from the times for 1 and for 1 + `steps` new tokens."""
    import torch

    ids = torch.tensor(prompts(batch, length, hf.config.vocab_size, seed), device=hf.device)

    def seconds(n):
        generate = lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        return timeit.timeit(generate, number=1)

    first = min(seconds(1), seconds(1))
    return batch * length / first, batch * steps / (seconds(1 + steps) - first)


def bandwidth(device) -> float:
    """Bytes per second of reading a tensor larger than any cache (512 MB)."""
    import torch

    x = torch.ones(2**27, device=device)
    return x.nbytes / min(timeit.repeat(lambda: x.sum().item(), number=1, repeat=5))


def bytes_per_step(model, batch: int, length: int) -> int:
    """Bytes that a decoding step must read: all matrices, and of each sequence the keys and values within each layer's window."""
    config = model.config
    weights = model.num_scaling_params()["scaling"]
    positions = sum(min(window + 1, length) if window >= 0 else length for window in model.window_sizes)
    width = config.n_kv_head * (config.n_embd // config.n_head)
    return (weights + batch * positions * 2 * width) * model.transformer.wte.weight.itemsize


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--depth", type=flags.DEPTH, default=4, help="layers")
    parser.add_argument("--vocab-size", type=flags.COUNT, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--batch", type=flags.COUNT, action="append", help="sequences at once; may be repeated (default 1, 4, 16, 64)")
    parser.add_argument("--prompt", type=flags.COUNT, default=64, help="tokens of each prompt before decoding")
    parser.add_argument("--prefill", type=flags.COUNT, default=512, help="tokens of the prompt whose prefill is measured")
    parser.add_argument("--steps", type=flags.COUNT, default=64, help="decoding steps")
    parser.add_argument("--repeats", type=flags.COUNT, default=3, help="repetitions of each measurement")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--profile", action="store_true", help="print where the time of a decoding step goes (on a CPU)")
    args = parser.parse_args(argv)

    from nanochat.common import compute_init

    compute_init(args.device)
    model = build(args.depth, 1024, args.vocab_size, args.device, noise=True)
    hf = build_hf(model.config, args.device)  # a GPT-2 with the same matrix products per token
    memory = bandwidth(args.device)
    best = lambda measure: max(measure(seed) for seed in range(args.repeats))
    ours = best(lambda seed: prefill_rate(model, args.prefill, seed))
    theirs = best(lambda seed: hf_rates(hf, 1, args.prefill, 1, seed)[0])
    print(f"depth {args.depth}, width {model.config.n_embd}, vocabulary {args.vocab_size}, {args.device}, memory {memory / 1e9:.1f} GB/s")
    print(f"{'':12s}{'tok/s':>8s}{'ms/step':>9s}{'of floor':>10s}{'hf tok/s':>10s}{'x hf':>7s}")
    print(f"prefill {args.prefill:<4d}{ours:8,.0f}{'':19s}{theirs:10,.0f}{ours / theirs:7.2f}")
    for batch in args.batch or [1, 4, 16, 64]:
        ours = best(lambda seed: decode_rate(model, batch, args.prompt, args.steps, seed))
        theirs = best(lambda seed: hf_rates(hf, batch, args.prompt, args.steps, seed)[1])
        floor = bytes_per_step(model, batch, args.prompt + args.steps // 2) / memory  # seconds
        print(f"decode {batch:<5d}{ours:8,.0f}{1e3 * batch / ours:9.2f}{floor * ours / batch:10.0%}{theirs:10,.0f}{ours / theirs:7.2f}",
              flush=True)  # fmt: skip
        if args.profile:
            print(f"{'':12s}{profile(model, batch, args.prompt, args.steps)}", flush=True)


if __name__ == "__main__":
    main()
