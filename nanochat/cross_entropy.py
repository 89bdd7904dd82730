"""Cross-entropy of the soft-capped head, without ever holding the logits of all tokens.

At 4096 tokens and a vocabulary of 32768, float32 logits take 537 MB, and most of the time of a naive loss goes into
writing them. Here tokens are processed in chunks whose logits stay in cache, and a chunk's gradient is computed while
they are there: three matrix products per chunk, nothing is recomputed, and only the two gradients are kept.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SAMPLE = 4096  # tokens of the vocabulary in a sampled softmax, or a multiple
CORRECTION = 0.5  # of the sampled softmax; with 1 the sum of exp(s) is unbiased, but learns less (modded-nanogpt, pull request 360)
SOFTCAP = 15.0  # logits are capped to (-15, 15), as in Gemma 2 (arXiv:2408.00118, section 2)


def softcapped_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden (..., d), weight (V, d) -> float32 (..., V): 15 * tanh(z / 15) of the product z."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcap_(logits: torch.Tensor) -> torch.Tensor:
    """The same cap in place on float32 products, for inference: 15 tanh(z / 15) = 15 - 30 / (1 + exp(2z / 15)).

    Nothing is allocated, and the sigmoid takes a CPU a tenth of the time of tanh.
    """
    return logits.mul_(-2 / SOFTCAP).sigmoid_().mul_(-2 * SOFTCAP).add_(SOFTCAP)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token in nats, (N,) float32, zero where the target is -1; for losses that weight tokens individually."""

    def chunk_losses(h, t):
        return F.cross_entropy(softcapped_logits(h, weight), t, ignore_index=-1, reduction="none")

    return _by_chunks(chunk_losses, hidden, weight, targets)


def sampling_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """Log-probability, in nats, of each token (N,) under the distribution that the engine samples from.

    That is the softmax of the logits divided by `temperature`, restricted to the `top_k` largest. A sampled token that
    rounding puts just outside of these counts as one of them.
    """
    k = min(top_k or weight.size(0), weight.size(0))

    def chunk_log_probs(h, t):
        scores = softcapped_logits(h, weight) / temperature  # (n, V)
        chosen = scores.gather(1, t[:, None])
        largest = scores if k == scores.size(1) else scores.topk(k).values  # in descending order
        total = largest.logsumexp(dim=1, keepdim=True)
        if k < scores.size(1):
            total = torch.where(chosen < largest[:, -1:], torch.logaddexp(total, chosen), total)
        return (chosen - total)[:, 0]

    return _by_chunks(chunk_log_probs, hidden, weight, tokens)


def _chunk_rows(hidden: torch.Tensor, vocab_size: int) -> int:
    """Tokens per chunk: logits of about 16 MB on a CPU (its cache), 1 GB on a GPU, in the dtype of `hidden`.

    A multiple of 128, for products at full speed, and half, a quarter, ... of all tokens where that is one.
    """
    budget = 2 ** (30 if hidden.is_cuda else 24) // hidden.element_size()
    chunks = 1 << (-(-hidden.size(0) * vocab_size // budget) - 1).bit_length()
    return -(-hidden.size(0) // (128 * chunks)) * 128


def _by_chunks(compute, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`compute(hidden, tokens)`, one number per token, a chunk at a time; recomputed in the backward pass."""
    rows = _chunk_rows(hidden, weight.size(0) * (2 if hidden.is_cuda else 1))  # these logits are float32
    chunks = zip(hidden.split(rows), tokens.split(rows))
    return torch.cat([checkpoint(compute, h, t, use_reentrant=False) for h, t in chunks])


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of hidden (N, d) and weight (V, d), summed over the targets (N,) that are not -1, in nats.

    `importance` (V,), of `sample_vocabulary`, makes it an estimate from a part of the vocabulary. In a compiled model the
    work on a chunk's logits is compiled, too.
    """
    return _linear_cross_entropy(hidden, weight, targets, importance, torch.compiler.is_compiling())[0]


def sample_vocabulary(is_target: torch.Tensor, seed: int) -> torch.Tensor:
    """Importance of each token in a sampled softmax, (V,): how many times its exp(s) counts. From bool (V,), on a CPU.

    All targets count once, so most of the probability is counted exactly. Of the others a sample counts q^-CORRECTION
    times, where q is the probability of being drawn (arXiv:1412.2007, section 3.1, with 1), and the rest is left out.
    There are at least as many drawn tokens as targets, and a multiple of SAMPLE of both together.
    """
    others = (~is_target).nonzero().flatten()
    targets = is_target.numel() - others.numel()
    drawn = min(-(-2 * targets // SAMPLE) * SAMPLE - targets, others.numel())
    order = torch.randperm(others.numel(), generator=torch.Generator().manual_seed(seed))
    importance = is_target.float()
    importance[others[order[:drawn]]] = (others.numel() / max(drawn, 1)) ** CORRECTION
    return importance


def _exp_and_slope(z: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exp(s) * ds/dz (V, C), the sums of exp(s) (C,)) of raw logits z (V, C), with s = 15 tanh(z / 15).

    exp(s) is multiplied by `importance`, (V,) or (1,).

    With r = 1 / (1 + exp(2z / 15)): s = 15 - 30 r and ds/dz = 4 r (1 - r). s stays within 15, so exp(s) needs no
    subtraction of the maximum. Compiled it is one pass over the chunk, whose blocks of rows are shared among threads.
    """
    r = torch.sigmoid(z.float() * (-2 / SOFTCAP))
    p = torch.exp(SOFTCAP - 2 * SOFTCAP * r) * importance[:, None]
    total = p.unflatten(0, (-1, math.gcd(z.size(0), 256))).sum(dim=1).sum(dim=0)
    return (p * (4 * r * (1 - r))).to(z.dtype), total


@lru_cache(maxsize=1)
def _compiled_exp_and_slope():
    return torch.compile(_exp_and_slope, dynamic=False)


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, importance: torch.Tensor | None, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed loss, its gradients with respect to hidden and weight); opaque to the compiler, so there is no graph break.

    With p = softmax(s) of a token, dL/dz = (p - onehot(target)) * ds/dz. The division by the token's sum of exp(s) is
    done on the small sides of the two products of dL/dz. Logits stand as (V, C), one column per token: a quarter faster
    to multiply on a CPU than (C, V).
    """
    if importance is None:
        return _chunks(hidden, weight, targets, torch.ones(1, device=weight.device), compiled)
    ids = importance.nonzero().flatten()
    places = torch.full((weight.size(0) + 1,), -1)  # the last one is of the target -1
    places[ids] = torch.arange(ids.numel())
    loss, d_hidden, d_rows = _chunks(hidden, weight[ids], places[targets], importance[ids], compiled)
    return loss, d_hidden, torch.zeros_like(weight).index_copy_(0, ids, d_rows)


def _chunks(hidden, weight, targets, importance, compiled: bool):
    """The same for the rows of `weight` whose exp(s) count `importance` (V,) times."""
    exp_and_slope = _compiled_exp_and_slope() if compiled else _exp_and_slope
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # exp(15) exceeds float16
    cast = weight.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    hidden = hidden.to(dtype)
    rows = _chunk_rows(hidden, weight.size(0))
    with torch.inference_mode():  # otherwise the compiler distinguishes tensors of the first step from later ones
        importance = importance.clone()
        for h, t, d_h in zip(hidden.split(rows), targets.split(rows), d_hidden.split(rows)):
            z = cast @ h.t()  # (V, C)
            valid, at_targets = (t >= 0).float(), (t.clamp(min=0), torch.arange(h.size(0), device=z.device))
            tanh = torch.tanh(z[at_targets].float() / SOFTCAP)  # (C,)
            z, total = exp_and_slope(z, importance)
            loss += ((total.log() - SOFTCAP * tanh) * valid).sum()
            z[at_targets] = ((torch.exp(SOFTCAP * tanh) - total) * (1 - tanh.square())).to(dtype)
            scale = (valid / total).unsqueeze(1)
            d_h.copy_((z.t() @ cast) * scale)
            h = (h * scale).to(dtype)
            if d_weight.dtype == dtype:
                d_weight.addmm_(z, h)
            else:
                d_weight += z @ h
    return loss, d_hidden, d_weight


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, importance, compiled):
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(weight)


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, d_loss, _d_hidden, _d_weight):
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_gradients)
