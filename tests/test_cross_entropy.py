"""The chunked loss against `F.cross_entropy` on whole float64 logits, gradients included."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from nanochat import cross_entropy
from nanochat.cross_entropy import linear_cross_entropy, sample_vocabulary, sampling_log_probs, softcapped_logits, token_losses


def problem(N=37, d=16, V=50, scale=1.0):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, d, generator=g) * scale, torch.randn(V, d, generator=g)
    return hidden, weight, torch.randint(-1, V, (N,), generator=g)


def gradients(loss, hidden, weight, targets):
    """(loss, d hidden, d weight)."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    value = loss(*leaves, targets)
    value.backward()
    return value.detach(), *(x.grad for x in leaves)


def reference(hidden, weight, targets, reduction="sum"):
    logits = 15 * torch.tanh(hidden.double() @ weight.double().T / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def assert_equal(got, expected):
    for a, b in zip(got, expected):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])  # the last one saturates the cap
def test_sum_and_gradients(monkeypatch, rows, scale):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda hidden, vocab: rows)
    inputs = problem(scale=scale)
    got = gradients(lambda *xs: 3 * linear_cross_entropy(*xs), *inputs)
    assert_equal(got, gradients(lambda *xs: 3 * reference(*xs), *inputs))


@pytest.mark.parametrize("vocab_size", [100, 32768, 49152, 50257, 151936])
@pytest.mark.parametrize("tokens", [2048, 65536, 24576])
def test_chunks_are_aligned_and_mostly_equal(tokens, vocab_size):
    """Else cuBLAS falls back to its slowest kernels."""
    rows = cross_entropy._chunk_rows(torch.empty(tokens, 1), vocab_size)
    assert rows % 128 == 0 and (rows == 128 or rows * vocab_size <= 2**22 + 128 * vocab_size)
    assert tokens % rows == 0


def test_a_sampled_softmax_of_the_whole_vocabulary_is_exact():
    inputs = problem()
    got = gradients(lambda *xs: linear_cross_entropy(*xs, torch.ones(50)), *inputs)
    assert_equal(got, gradients(reference, *inputs))


def test_a_fully_corrected_sampled_softmax_is_unbiased(monkeypatch):
    """The estimate of sum(exp(s)) / exp(s_target), which is exp(loss), and its gradients."""
    monkeypatch.setattr(cross_entropy, "CORRECTION", 1.0)
    monkeypatch.setattr(cross_entropy, "SAMPLE", 20)
    hidden, weight, _ = problem(N=1)
    inputs = hidden, weight, torch.tensor([7])
    samples = [sample_vocabulary(torch.arange(50) == 7, seed) for seed in range(1000)]
    assert {(int((x > 0).sum()), x[7].item()) for x in samples} == {(20, 1.0)}
    draws = [gradients(lambda *xs: linear_cross_entropy(*xs, sample).exp(), *inputs) for sample in samples]
    for got, expected in zip(zip(*draws), gradients(lambda *xs: reference(*xs).exp(), *inputs)):
        got = torch.stack(got).double()
        error, standard_error = got.mean(0) - expected, got.std(0) / 1000**0.5
        assert (error.abs() <= 4.5 * standard_error + 1e-5 * expected.abs()).all()


def test_losses_per_token_can_be_weighted():
    inputs, advantage = problem(), torch.randn(37, generator=torch.Generator().manual_seed(1))
    got = gradients(lambda *xs: (token_losses(*xs) * advantage).sum(), *inputs)
    assert_equal(got, gradients(lambda *xs: (reference(*xs, "none") * advantage).sum(), *inputs))
    none = gradients(linear_cross_entropy, *inputs[:2], torch.full((37,), -1))
    assert not any(x.any() for x in none), "without a target loss and gradients are zero"


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, 5), (1.3, 1), (1.0, 1000)])
def test_log_probs_are_those_of_the_sampling_distribution(monkeypatch, temperature, top_k):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda hidden, vocab: 8)
    hidden, weight, _ = problem()
    rows, k, advantage = torch.arange(37), min(top_k or 50, 50), torch.linspace(-1, 1, 37)
    tokens = (hidden @ weight.T).topk(k).indices[rows, rows % k]

    def expected(hidden, weight, tokens):
        logits = 15 * torch.tanh(hidden.double() @ weight.double().T / 15) / temperature
        kept = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
        return kept.log_softmax(-1)[rows, tokens]

    got = gradients(lambda *xs: (sampling_log_probs(*xs, temperature, top_k) * advantage).sum(), hidden, weight, tokens)
    assert_equal(got, gradients(lambda *xs: (expected(*xs) * advantage).sum(), hidden, weight, tokens))


def test_a_sampled_token_that_rounding_puts_outside_of_the_top_k_is_counted_in():
    hidden, weight, _ = problem(N=1)
    scores, order = softcapped_logits(hidden, weight)[0].sort(descending=True)
    found = sampling_log_probs(hidden, weight, order[3:4], top_k=3)
    assert found.item() == pytest.approx((scores[3] - scores[:4].logsumexp(0)).item(), abs=1e-5)


def test_bfloat16_activations_with_float32_weights():
    hidden, weight, targets = problem(N=64)
    got = gradients(linear_cross_entropy, hidden.bfloat16(), weight, targets)
    expected = gradients(reference, hidden.bfloat16(), weight, targets)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-2)
    assert F.cosine_similarity(got[2].flatten(), expected[2].flatten(), dim=0) > 0.999


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_the_compiled_loss_equals_the_uncompiled_one_without_a_graph_break():
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    inputs = problem(N=200, V=64)
    assert_equal(gradients(compiled, *inputs), gradients(linear_cross_entropy, *inputs))
    assert cross_entropy._compiled_exp_and_slope.cache_info().currsize == 1
