"""Training speed on a CPU: what the compiler, the chunked loss and the sampled softmax gain.

    python -m dev.bench.train                       # depth 4, vocabulary 32768, 8 rows of 512 tokens
    python -m dev.bench.train --depth 2 --vocab-size 2048 --sequence-len 128 --steps 2

    sampled    the model as base_train runs it, with a sampled softmax
    compiled   with the softmax over the whole vocabulary, as at the end of a run and in later stages
    eager      the same uncompiled: the baseline of the ratios
    textbook   uncompiled, with all logits at once and F.cross_entropy

The variants take turns, so that a busy neighbour slows all of them; times are medians, after one step of warm-up.
"of matmul" is the FLOP rate of the step (GPT.estimate_flops) divided by that of a matrix product whose operands stay
in cache.
"""

from __future__ import annotations

import tempfile
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


def matmul_rate(dtype) -> float:
    """FLOP/s of a matrix product whose operands stay in cache."""
    import torch

    a, b = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
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
    from nanochat.training import backward_and_step, sampled_softmax

    compute = compute_init("cpu", training=True)
    model = build(args.depth, args.sequence_len, args.vocab_size, "cpu", compute.dtype)
    optimizer = MuonAdamW(model.param_groups())
    # As in text, few tokens of the vocabulary are frequent
    tokens = (args.vocab_size * torch.rand(2, args.rows, args.sequence_len) ** 4).long()
    inputs, targets = tokens
    compiled = compile_model(model, compute)
    whole, sample = torch.ones(args.vocab_size), sampled_softmax([(inputs, targets)], args.vocab_size, compute, seed=0)
    variants = {
        "sampled": lambda: compiled(inputs.int(), targets, importance=sample),
        "compiled": lambda: compiled(inputs.int(), targets, importance=whole),
        "eager": lambda: model(inputs.int(), targets),
        "textbook": lambda: F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()),
    }
    times = {name: [] for name in variants}
    for _ in range(args.steps + 1):
        for name, variant in variants.items():
            step = lambda: backward_and_step([variant()], optimizer, compute)
            times[name].append(timeit.timeit(step, number=1))

    matmul = matmul_rate(compute.dtype)
    seconds = {name: median(steps[1:]) for name, steps in times.items()}
    print(f"depth {args.depth}, vocabulary {args.vocab_size}, {targets.numel()} tokens per step; "
          f"{torch.get_num_threads()} threads, {compute.dtype}, matrix product {matmul / 1e9:.0f} GFLOP/s")
    print(f"{'':10s}{'s/step':>8s}{'tok/s':>9s}{'x eager':>9s}{'of matmul':>11s}")
    for name in variants:
        rate = targets.numel() / seconds[name]
        print(f"{name:10s}{seconds[name]:8.3f}{rate:9,.0f}{seconds['eager'] / seconds[name]:9.2f}"
              f"{rate * model.estimate_flops() / matmul:11.0%}")
    print(f"loader, 32 rows of 2048 tokens: {loader_rate(32, 2048, 'cpu') / 1e6:.1f}M tok/s")


if __name__ == "__main__":
    main()
