"""How well a model predicts text: bits per byte, and what it says when left to go on.

The one idea to know: loss per token depends on the vocabulary (longer tokens are harder to
guess, and fewer), bits per byte does not. It is the loss of all target tokens in nats, divided
by ln 2 and by the bytes of text that those tokens stand for. Special tokens stand for no text
and count on neither side.
"""

from __future__ import annotations

import math
from typing import Iterable

import torch

from nanochat.common import Compute
from nanochat.engine import Engine

# What a base model is asked to go on with, so that a person sees what a loss means.
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


MOST_LANES = 64  # independent streams of text for a measurement; so many ranks at most share the work


def share_of(tokens: int, documents: int, B: int, T: int, compute: Compute) -> tuple[int, int]:
    """How a measurement over about `tokens` tokens is divided: (lanes of the loader, batches of (B, T) on this rank).

    Lanes depend on the size of the measurement and the number of documents (or conversations) that there are,
    not on the ranks, so the text that is measured is the same on any number of ranks.
    """
    batches = max(1, tokens // (B * T))
    lanes = min(batches, MOST_LANES, max(1, documents // 8))
    return lanes, batches // lanes * len(compute.shard(lanes))


@torch.no_grad()
def evaluate_bpb(model, batches: Iterable[tuple], steps: int, token_bytes: torch.Tensor, compute: Compute) -> float:
    """Bits per byte over `steps` batches on each rank: the same number on every rank.

    `batches` yields (inputs, targets, ...), both (B, T), targets of -1 ignored. `token_bytes`
    (vocab_size,) is the bytes of text behind each id, 0 for special tokens. Infinite when the
    targets hold no text at all.
    """
    token_bytes = token_bytes.to(compute.device)
    # MPS knows no float64; float32 is good to about 1e-6 here, since each addend is a batch's whole sum.
    exact = torch.float32 if compute.device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=exact, device=compute.device)
    n_bytes = torch.zeros((), dtype=torch.int64, device=compute.device)
    for _, (inputs, targets, *_) in zip(range(steps), batches):
        losses = model(inputs, targets, loss_reduction="none")  # (B, T) nats
        target_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats += torch.where(target_bytes > 0, losses, 0).to(exact).sum()
        n_bytes += target_bytes.sum()
        compute.heartbeat()
    nats, n_bytes = compute.sum(nats).item(), compute.sum(n_bytes).item()
    return nats / (math.log(2) * n_bytes) if n_bytes > 0 else math.inf


def sample_texts(model, tokenizer, max_tokens: int = 16) -> list[str]:
    """`SAMPLE_PROMPTS`, each with what the model finds likeliest to follow, up to the end of the document."""
    prompts = tokenizer.encode(SAMPLE_PROMPTS, prepend=tokenizer.get_bos_token_id())
    # In the midst of training memory is dear: a row need not hold a whole context.
    engine = Engine(model, tokenizer, context=max(map(len, prompts)) + max_tokens)
    rows = [engine.submit(ids, max_tokens, temperature=0.0) for ids in prompts]
    for _ in engine.finish():
        pass
    return [tokenizer.decode([id for id in row.tokens[1:] if id not in engine.terminal_tokens]) for row in rows]
