"""Speed of reading and writing on this machine, against the naive loop and Hugging Face's `generate`, in one run.

    python -m dev.bench.engine                          # depth 4, vocabulary 32768, batches of 1, 4, 16, 64
    python -m dev.bench.engine --depth 12 --batch 1 --batch 16

Reading is tokens of prompts per second, writing tokens of all rows per second, from prompts of
`--prompt` tokens on. Weights are random; prompts differ, so that nothing is read by looking it up.
    ours       Engine.submit and Engine.step
    naive      GPT.generate: the whole sequence anew for every token
    hf         GPT-2 of transformers with the same width, depth, heads and vocabulary, float32, its own cache
The floor is memory: a round reads every matrix once, and the keys and values that its rows see. Their bytes
per second are compared with those of summing a large tensor here.
"""

from __future__ import annotations

import argparse
import random
import time

from dev.bench.model import build


class NoTokenizer:
    """What the engine asks of a tokenizer; its special tokens are outside the vocabulary, so rows end at their limit."""

    def encode_special(self, name):
        return -1

    def get_bos_token_id(self):
        return -1


def prompts(n: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(n)]


def best_of(repeats: int, measure) -> float:
    """The largest of so many measurements: neighbours on the machine only ever make it slower."""
    return max(measure(seed) for seed in range(repeats))


def read_ours(model, length: int, seed: int) -> float:
    """Tokens per second of one prompt until it joins those that write."""
    from nanochat.engine import Engine

    engine = Engine(model, NoTokenizer(), max_sequences=1)
    (prompt,) = prompts(1, length, model.config.vocab_size, seed)
    engine.submit(prompt[:2], max_tokens=1)
    engine.step()  # memory is taken now
    row = engine.submit(prompt, max_tokens=1)
    started = time.perf_counter()
    while row.finish_reason is None:
        engine.step()
    return length / (time.perf_counter() - started)


def write_ours(model, batch: int, length: int, tokens: int, temperature: float, seed: int) -> float:
    """Tokens per second of all rows once every one of them writes."""
    from nanochat.engine import Engine

    engine = Engine(model, NoTokenizer(), max_sequences=batch)
    for i, prompt in enumerate(prompts(batch, length, model.config.vocab_size, seed)):
        engine.submit(prompt, temperature=temperature, top_k=50, seed=i)
    while len(engine.step()) < batch:
        pass
    started = time.perf_counter()
    for _ in range(tokens):
        assert len(engine.step()) == batch
    return batch * tokens / (time.perf_counter() - started)


def naive(model, length: int, tokens: int, seed: int) -> float:
    (prompt,) = prompts(1, length, model.config.vocab_size, seed)
    started = time.perf_counter()
    assert len(list(model.generate(prompt, max_tokens=tokens, temperature=0.0))) == tokens
    return tokens / (time.perf_counter() - started)


def build_peer(config, device: str):
    """GPT-2 with the same products per token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    peer = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.sequence_len, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(peer).eval().to(device)


def peer_speeds(peer, batch: int, length: int, tokens: int, temperature: float, seed: int) -> tuple[float, float]:
    """(reading, writing) tokens per second: `generate` of one token, and of `tokens` more."""
    import torch

    ids = torch.tensor(prompts(batch, length, peer.config.vocab_size, seed), device=peer.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}

    def seconds(n):
        started = time.perf_counter()
        peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **sampling)
        return time.perf_counter() - started

    first = min(seconds(1), seconds(1))
    return batch * length / first, batch * tokens / (seconds(1 + tokens) - first)


def bandwidth(device: str) -> float:
    """Bytes per second of reading a tensor that no cache holds."""
    import torch

    x = torch.ones(2**27, device=device)  # 512 MB
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - started))
    return best


def bytes_per_round(model, batch: int, length: int) -> int:
    """What a round has to read: every matrix once, and of each row the keys and values that its layers see."""
    config = model.config
    weights = sum(p.nbytes for p in model.transformer.h.parameters()) + model.lm_head.weight.nbytes
    seen = sum(min(window + 1, length) if window >= 0 else length for window in model.window_sizes)
    return weights + batch * seen * 2 * config.n_kv_head * (config.n_embd // config.n_head) * model.lm_head.weight.itemsize


def main(argv=None):
    parser = argparse.ArgumentParser(description="Engine speed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--context", type=int, default=1024, help="the model's context")
    parser.add_argument("--batch", type=int, action="append", help="rows at once; may be repeated; None: 1, 4, 16, 64")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt before writing")
    parser.add_argument("--read", type=int, default=512, help="tokens of a prompt when reading is measured")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each row writes")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest; above: top-k 50")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--skip-peers", action="store_true", help="ours alone")
    args = parser.parse_args(argv)

    from nanochat.common import compute_init

    compute_init(args.device)
    from nanochat.device import prepare_for_inference

    model = prepare_for_inference(build(args.depth, args.context, args.vocab_size, args.device, noise=True).eval())
    peer = None if args.skip_peers else build_peer(model.config, args.device)
    speed = bandwidth(args.device)
    print(f"depth {args.depth}, width {model.config.n_embd}, vocabulary {args.vocab_size}, {args.device}, memory {speed / 1e9:.1f} GB/s")
    read = best_of(args.repeats, lambda seed: read_ours(model, args.read, seed))
    line = f"reading {args.read} tokens: ours {read:,.0f} tok/s"
    if peer:
        theirs = best_of(args.repeats, lambda seed: peer_speeds(peer, 1, args.read, 1, 0.0, seed)[0])
        line += f", hf {theirs:,.0f} ({read / theirs:.2f}x)"
    print(line)
    print(f"{'rows':>4s} {'ours tok/s':>11s} {'ms/round':>9s} {'memory':>7s} {'hf tok/s':>9s} {'x hf':>6s} {'naive':>7s} {'x naive':>8s}")
    for batch in args.batch or [1, 4, 16, 64]:
        size = (batch, args.prompt, args.tokens, args.temperature)
        ours = best_of(args.repeats, lambda seed: write_ours(model, *size, seed))
        share = bytes_per_round(model, batch, args.prompt + args.tokens // 2) * ours / batch / speed
        line = f"{batch:4d} {ours:11,.0f} {1e3 * batch / ours:9.2f} {share:7.0%}"
        if peer:
            theirs = best_of(args.repeats, lambda seed: peer_speeds(peer, *size, seed)[1])
            line += f" {theirs:9,.0f} {ours / theirs:6.2f}"
        if peer and batch == 1:
            slow = best_of(args.repeats, lambda seed: naive(model, args.prompt, args.tokens, seed))
            line += f" {slow:7,.0f} {ours / slow:8.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
