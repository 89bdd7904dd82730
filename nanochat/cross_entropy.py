"""Cross-entropy of the soft-capped head, without ever holding the logits of all tokens.

At 4096 tokens and 32768 vocabulary entries float32 logits take 537 MB, and writing them
out, not multiplying, is what a naive loss spends its time on. Here tokens go by in chunks
whose logits stay in cache, and a chunk's gradient is formed while they are there: three
matrix products per chunk, nothing computed twice, nothing kept but the two gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SOFTCAP = 15.0  # logits are squashed to (-15, 15), as in Gemma 2 (arXiv:2408.00118, section 2)


def softcapped_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden (..., d), weight (V, d) -> float32 (..., V): 15 * tanh(z / 15) of the product z."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token in nats, (N,) float32, zero where the target is -1.

    For losses that weigh tokens one by one: chunks are computed again in the backward pass.
    """

    def chunk_losses(h, t):
        return F.cross_entropy(softcapped_logits(h, weight), t, ignore_index=-1, reduction="none")

    rows = _chunk_rows(hidden, weight.size(0))
    chunks = zip(hidden.split(rows), targets.split(rows))
    return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks])


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the soft-capped head, summed over the targets that are not -1, in nats.

    hidden (N, d), weight (V, d), targets (N,). Logits exist for one chunk of tokens at a
    time; where a gradient is wanted it is formed right there, in three matrix products per chunk.
    """
    return _linear_cross_entropy(hidden, weight, targets)[0]


def _chunk_rows(hidden: torch.Tensor, vocab_size: int) -> int:
    """Tokens whose logits are held at once: about 16 MB on a CPU (its cache), 1 GB on a GPU."""
    budget = 2**30 if hidden.is_cuda else 2**24
    return max(64, budget // (4 * vocab_size))


def _chunk_loss_and_grad(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and its gradient by the raw logits z, written over them.

    With s = 15 tanh(z / 15) and p = softmax(s): dL/dz = (p - onehot(target)) * (1 - tanh^2),
    and zero where the target is -1. s stays within 15, so exp(s) needs no maximum taken off.
    logits (C, V) float32; targets (C,).
    """
    counted = (targets >= 0).unsqueeze(1)
    targets = targets.clamp(min=0).unsqueeze(1)
    tanh = logits.mul_(2 / SOFTCAP).exp_().add_(1).reciprocal_().mul_(-2).add_(1)  # 1 - 2 / (exp(2z/15) + 1)
    p = (tanh * SOFTCAP).exp_()
    total = p.sum(dim=1, keepdim=True)
    losses = total.log() - SOFTCAP * tanh.gather(1, targets)
    p.mul_(counted / total)
    p.scatter_add_(1, targets, -counted.to(p.dtype))
    slope = tanh.square_().neg_().add_(1)
    return (losses * counted).sum(), p.mul_(slope)


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed loss, its gradient by hidden, its gradient by weight); opaque to the compiler, so it makes no graph break."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight)
    cast = weight.to(hidden.dtype)
    rows = _chunk_rows(hidden, weight.size(0))
    for h, t, d_h in zip(hidden.split(rows), targets.split(rows), d_hidden.split(rows)):
        chunk_loss, grad = _chunk_loss_and_grad((h @ cast.t()).float(), t)
        loss += chunk_loss
        grad = grad.to(hidden.dtype)
        torch.mm(grad, cast, out=d_h)
        if d_weight.dtype == hidden.dtype:
            d_weight.addmm_(grad.t(), h)
        else:
            d_weight += grad.t() @ h
    return loss, d_hidden, d_weight


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets):
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(weight)


def _save_grads(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_loss, _d_hidden, _d_weight):
    d_hidden, d_weight = ctx.saved_tensors
    return (d_hidden * grad_loss.to(d_hidden.dtype)), d_weight * grad_loss, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_grads)
