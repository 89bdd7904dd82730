"""How well a model predicts text: bits per byte, and samples from fixed prompts.

The loss per token depends on the vocabulary (longer tokens are fewer and harder to predict), bits per byte do not: the
loss of all target tokens in nats, divided by ln 2 and by the bytes of text that those tokens stand for. Special tokens
stand for no text and are left out of both sums.
"""

import math
from typing import Callable, Iterable

import torch

from nanochat.common import Compute
from nanochat.engine import Engine

# A base model continues these, so that a person sees what a loss means.
SAMPLE_PROMPTS = [
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "If 5*x + 3 = 13, then x is",
    "My favorite color is",
    "Once upon a time",
]


def eval_batches(tokens: int, B: int, T: int, compute: Compute) -> tuple[int, int]:
    """How the ranks share a measurement over about `tokens` tokens (-1: 20 * 2^20, on a CPU 2^16).

    Returns (rows in total, micro-batches of this rank). Pass the rows as the loader's `rows_per_step`: they depend neither
    on B nor on the ranks, so neither does the result.
    """
    if tokens == -1:
        tokens = 2**16 if compute.device.type == "cpu" else 20 * 2**20
    rows = max(1, tokens // T)
    return rows, len(compute.shard(-(-rows // B)))


@torch.no_grad()
def evaluate_bpb(
    model, batches: Iterable[tuple], steps: int, token_bytes: torch.Tensor, compute: Compute,
    stop: Callable[[], bool] | None = None,
) -> float | None:  # fmt: skip
    """Bits per byte over the next `steps` batches of each rank: the same number on every rank.

    `batches` yields (inputs, targets, ...), both (B, T); targets of -1 are ignored. `steps` may differ between ranks and
    be 0. `token_bytes` (vocab_size,) are the bytes of text behind each id, 0 for special tokens. `stop` is polled before
    each batch and must return the same on all ranks; then the result is None. It is infinity without any text.
    """
    token_bytes = token_bytes.to(compute.device)
    # MPS has no float64; float32 is accurate to about 1e-6 here, since each addend is the sum of a whole batch
    exact = torch.float32 if compute.device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=exact, device=compute.device)
    n_bytes = torch.zeros((), dtype=torch.int64, device=compute.device)
    batches = iter(batches)
    for step in range(max(compute.gather(steps))):
        if stop and stop():
            return None
        if step < steps:
            inputs, targets, *_ = next(batches)
            losses = model(inputs, targets, loss_reduction="none")  # (B, T) nats
            target_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
            nats += torch.where(target_bytes > 0, losses, 0).to(exact).sum()
            n_bytes += target_bytes.sum()
        compute.heartbeat()
    nats, n_bytes = compute.sum(nats).item(), compute.sum(n_bytes).item()
    return nats / (math.log(2) * n_bytes) if n_bytes > 0 else math.inf


def sample_texts(model, tokenizer, max_tokens: int = 16) -> list[str]:
    """`SAMPLE_PROMPTS`, each with the model's greedy continuation, up to the end of the document."""
    prompts = tokenizer.encode(SAMPLE_PROMPTS, prepend=tokenizer.get_bos_token_id())
    # A short context: during training there is little memory left for a KV cache.
    engine = Engine(model, tokenizer, context=max(map(len, prompts)) + max_tokens)
    sequences = [engine.submit(ids, max_tokens, temperature=0.0) for ids in prompts]
    try:
        list(engine.finish())
    finally:
        for module in model.modules():
            module.__dict__.pop("product", None)  # a copy of the weights (inference.py), whose memory training needs
    return [tokenizer.decode([id for id in seq.tokens[1:] if id not in engine.terminal_tokens]) for seq in sequences]
