"""The chunked loss against `F.cross_entropy` on whole float64 logits, gradients included."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from nanochat import cross_entropy
from nanochat.cross_entropy import linear_cross_entropy, sampling_log_probs, softcapped_logits, token_losses


def problem(N=37, d=16, V=50, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, d, generator=g) * scale
    weight = torch.randn(V, d, generator=g)
    targets = torch.randint(-1, V, (N,), generator=g)
    return hidden, weight, targets


def reference(hidden, weight, targets, reduction="sum"):
    logits = 15 * torch.tanh(hidden.double() @ weight.double().T / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])  # the last one saturates the cap
def test_sum_and_gradients(monkeypatch, rows, scale):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda hidden, vocab: rows)
    hidden, weight, targets = problem(scale=scale)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, targets)
    (3 * loss).backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference(h64, w64, targets)
    (3 * expected).backward()
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-4 * h64.grad.abs().max())
    assert torch.allclose(w.grad.double(), w64.grad, atol=1e-4 * w64.grad.abs().max())


def test_without_targets_loss_and_gradients_are_zero():
    hidden, weight, targets = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -1))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_per_token_losses_can_be_weighted():
    hidden, weight, targets = problem()
    advantage = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = token_losses(h, w, targets)
    (losses * advantage).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference(h64, w64, targets, "none")
    (expected * advantage).sum().backward()
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert losses[targets < 0].eq(0).all()
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-4)
    assert torch.allclose(w.grad.double(), w64.grad, atol=1e-4)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, 5), (1.3, 1), (1.0, 1000)])
def test_log_probs_of_the_sampling_distribution(monkeypatch, temperature, top_k):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda hidden, vocab: 8)
    hidden, weight, _ = problem()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = 15 * torch.tanh(h64 @ w64.T / 15) / temperature
    k = min(top_k or 50, 50)
    smallest = logits.topk(k).values[:, -1:]
    expected = logits.masked_fill(logits < smallest, -torch.inf).log_softmax(-1)
    tokens = logits.topk(k).indices[torch.arange(37), torch.arange(37) % k]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = sampling_log_probs(h, w, tokens, temperature, top_k)
    assert torch.allclose(found.double(), expected.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    advantage = torch.randn(37, generator=torch.Generator().manual_seed(1))
    (found * advantage).sum().backward()
    (expected.gather(1, tokens[:, None])[:, 0] * advantage).sum().backward()
    assert torch.allclose(h.grad.double(), h64.grad, atol=1e-4) and torch.allclose(w.grad.double(), w64.grad, atol=1e-4)


def test_a_sampled_token_that_rounding_puts_outside_of_the_top_k_is_counted_in():
    hidden, weight, _ = problem(N=1)
    scores, order = softcapped_logits(hidden, weight)[0].sort(descending=True)
    found = sampling_log_probs(hidden, weight, order[3:4], top_k=3)
    assert found.item() == pytest.approx((scores[3] - scores[:4].logsumexp(0)).item(), abs=1e-5)


def test_bfloat16_activations_with_float32_weights():
    hidden, weight, targets = problem(N=64)
    h, w = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, targets)
    loss.backward()
    w64 = weight.double().requires_grad_()
    expected = reference(hidden.bfloat16(), w64, targets)
    expected.backward()
    assert loss.dtype == torch.float32 and w.grad.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    assert abs(loss.item() / expected.item() - 1) < 1e-2
    cosine = F.cosine_similarity(w.grad.double().flatten(), w64.grad.flatten(), dim=0)
    assert cosine > 0.999


def test_logits_stay_within_the_cap():
    hidden, weight, _ = problem(scale=100.0)
    logits = softcapped_logits(hidden.bfloat16(), weight)
    assert logits.dtype == torch.float32 and logits.abs().max() <= 15


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_loss_equals_the_uncompiled_one_without_a_graph_break():
    hidden, weight, targets = problem(N=200, V=64)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    model = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = model(h, w, targets)
    loss.backward()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = linear_cross_entropy(h2, w2, targets)
    expected.backward()
    assert cross_entropy._compiled_exp_and_slope.cache_info().currsize == 1
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(h.grad, h2.grad, atol=1e-5) and torch.allclose(w.grad, w2.grad, atol=1e-5)
