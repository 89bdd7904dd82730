"""Training speed on a CPU: where the time of a step goes, and what the compiler and the chunked loss gain.

    python -m dev.bench.train                       # depth 4, vocabulary 32768, 8 rows of 512 tokens
    python -m dev.bench.train --depth 2 --vocab-size 2048 --sequence-len 128 --steps 2

    compiled   the model as the training scripts run it
    eager      the same model uncompiled: the baseline of the ratios
    textbook   uncompiled, with all logits at once and F.cross_entropy

The variants take turns, so that a busy neighbour slows all of them; times are medians, after one step of warm-up.
"of matmul" is the FLOP rate of the step (GPT.estimate_flops) divided by that of a matrix product whose operands stay
in cache. The chunked loss computes its gradient in the forward pass.
"""

from __future__ import annotations

import tempfile
import time
import timeit
from statistics import median

from nanochat import flags


def build(depth: int, context: int, vocab_size: int, device, dtype=None, noise: bool = False):
    """A model with random weights and the shape that base_train gives to a depth.

    `noise`: also where weights start at zero (the output projections), so that every layer affects the logits.
    """
    import torch

    from nanochat.gpt import GPT, config_of_depth

    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config_of_depth(depth, vocab_size, context))
    model.to_empty(device=device)
    model.init_weights(dtype)
    if noise:
        width = model.config.n_embd
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_proj.weight.normal_(std=width**-0.5)
                block.mlp.c_proj.weight.normal_(std=width**-0.5 / 2)
            model.lm_head.weight.normal_(std=0.02)
    return model


def timed_step(model, optimizer, inputs, targets) -> tuple[float, float, float]:
    """Seconds of forward, backward and optimizer of one step."""
    start = time.perf_counter()
    loss = model(inputs, targets)
    forward = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    return forward - start, backward - forward, time.perf_counter() - backward


def matmul_rate() -> float:
    """FLOP/s of a matrix product whose operands stay in cache."""
    import torch

    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    best = min(timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=50))
    return 2 * 512 * 1024 * 1024 / best


def loader_rate(B: int, T: int, device, vocab_size: int = 4096, megabytes: int = 10, batches: int = 60) -> float:
    """Tokens per second of the document loader on the built-in corpus: reading, tokenizing, packing and copying to `device`."""
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.sample_world import documents, write_shards
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(documents(size=1_000_000), vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, size=megabytes * 1_000_000)
        loader = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, B, T, "train", device=device, source=folder)
        timeit.timeit(lambda: next(loader), number=batches // 3)  # more than are prefetched
        seconds = timeit.timeit(lambda: next(loader), number=batches)
        loader.close()
    return batches * B * T / seconds


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--depth", type=flags.DEPTH, default=4, help="layers")
    parser.add_argument("--vocab-size", type=flags.COUNT, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--sequence-len", type=flags.COUNT, default=512, help="tokens per row")
    parser.add_argument("--rows", type=flags.COUNT, default=8, help="rows per step")
    parser.add_argument("--steps", type=flags.COUNT, default=8, help="timed steps per variant")
    args = parser.parse_args(argv)

    import torch
    import torch.nn.functional as F

    from nanochat.common import compute_init
    from nanochat.device import compile_model
    from nanochat.optim import MuonAdamW

    compute = compute_init("cpu")
    model = build(args.depth, args.sequence_len, args.vocab_size, "cpu")
    optimizer = MuonAdamW(model.param_groups())

    def textbook(inputs, targets):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    variants = {"compiled": compile_model(model, compute, args.rows), "eager": model, "textbook": textbook}
    inputs, targets = torch.randint(0, args.vocab_size, (2, args.rows, args.sequence_len))  # random tokens cost what text does
    times = {name: [] for name in variants}
    for step in range(args.steps + 1):
        for name, variant in variants.items():
            seconds = timed_step(variant, optimizer, inputs.int(), targets)
            if step > 0:
                times[name].append(seconds)

    tokens, matmul = args.rows * args.sequence_len, matmul_rate()
    seconds = {name: median(map(sum, steps)) for name, steps in times.items()}
    print(f"depth {args.depth}, vocabulary {args.vocab_size}, {tokens} tokens per step, {torch.get_num_threads()} threads; "
          f"matrix product {matmul / 1e9:.0f} GFLOP/s")
    print(f"{'':10s}{'s/step':>8s}{'tok/s':>9s}{'x eager':>9s}{'of matmul':>11s}{'forward':>9s}{'backward':>10s}{'optimizer':>11s}")
    for name, steps in times.items():
        rate = tokens / seconds[name]
        forward, backward, update = (median(part) / seconds[name] for part in zip(*steps))
        print(f"{name:10s}{seconds[name]:8.3f}{rate:9,.0f}{seconds['eager'] / seconds[name]:9.2f}"
              f"{rate * model.estimate_flops() / matmul:11.0%}{forward:9.0%}{backward:10.0%}{update:11.0%}")
    print(f"loader, 32 rows of 2048 tokens: {loader_rate(32, 2048, 'cpu') / 1e6:.1f}M tok/s")


if __name__ == "__main__":
    main()
