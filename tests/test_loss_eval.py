"""Bits per byte against brute force in float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from tiny import BOS, CPU, END, ByteTokenizer, tiny_gpt

from nanochat.loss_eval import SAMPLE_PROMPTS, eval_batches, evaluate_bpb, sample_texts

# Ids 38 and 39 are special; the others stand for 1 to 5 bytes.
TOKEN_BYTES = torch.tensor([1 + i % 5 for i in range(38)] + [0, 0], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_gpt(sequence_len=32, vocab_size=40, head_std=0.1)


def make_batches(n, seed=1, special=0.0):
    """Targets of which a tenth is -1, and the share `special` is a special token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(0, 40, (3, 33), generator=generator)
        targets, u = ids[:, 1:].clone(), torch.rand(3, 32, generator=generator)
        targets[u > 1 - special] = 39
        targets[u < 0.1] = -1
        yield ids[:, :-1].int(), targets, {"epoch": 1}


def brute_force(model, batches):
    nats, n_bytes = 0.0, 0
    for inputs, targets, _ in batches:
        with torch.no_grad():
            log_probabilities = F.log_softmax(model(inputs).double(), dim=-1)
        for row, target in zip(log_probabilities.flatten(0, 1), targets.flatten()):
            if target >= 0 and TOKEN_BYTES[target] > 0:
                nats -= row[target].item()
                n_bytes += TOKEN_BYTES[target].item()
    return nats / n_bytes / math.log(2)


def test_bpb_of_the_requested_batches_equals_brute_force(model):
    batches = make_batches(5)
    measured = evaluate_bpb(model, batches, 4, TOKEN_BYTES, CPU, stop=lambda: False)
    assert measured == pytest.approx(brute_force(model, make_batches(4)), rel=1e-6)
    assert len(list(batches)) == 1, "no more batches were consumed"
    assert evaluate_bpb(model, batches, 1, TOKEN_BYTES, CPU, stop=lambda: True) is None, "no batch is requested"
    special = torch.full((1, 4), 39)
    assert evaluate_bpb(model, [(special, special)], 1, TOKEN_BYTES, CPU) == math.inf, "no text at all"


def test_bytes_and_nats_are_summed_over_ranks_before_division(model, run_ranks):
    def measure(compute):
        batches, steps = (make_batches(2), 2) if compute.is_main else (make_batches(1, 2, special=0.8), 1)
        return evaluate_bpb(model, batches, steps, TOKEN_BYTES, compute)

    expected = brute_force(model, [*make_batches(2), *make_batches(1, 2, special=0.8)])
    assert run_ranks(2, measure) == [pytest.approx(expected, rel=1e-6)] * 2


@given(tokens=st.integers(1, 10**6), B=st.integers(1, 64), world_size=st.integers(1, 100))
def test_measurement_is_shared_completely_by_any_number_of_ranks(tokens, B, world_size):
    ranks = [dataclasses.replace(CPU, rank=r, world_size=world_size) for r in range(world_size)]
    rows, batches = zip(*(eval_batches(tokens, B, 32, rank) for rank in ranks))
    assert set(rows) == {max(1, tokens // 32)}
    assert (sum(batches) - 1) * B < rows[0] <= sum(batches) * B


def test_stop_is_polled_equally_often_on_all_ranks(model, run_ranks):
    def measure(compute):
        polls = []

        def stop():
            polls.append(1)
            return any(compute.gather(len(polls) > 2))  # a collective, as in training

        steps = 2 if compute.is_main else 3
        return evaluate_bpb(model, make_batches(steps), steps, TOKEN_BYTES, compute, stop), len(polls)

    assert run_ranks(2, measure) == [(None, 3)] * 2


def test_sample_texts_are_greedy_continuations():
    tokenizer, model = ByteTokenizer(), tiny_gpt(sequence_len=80, head_std=0.5)
    texts = sample_texts(model, tokenizer, max_tokens=5)
    for ids, text in zip(tokenizer.encode(SAMPLE_PROMPTS, prepend=BOS), texts, strict=True):
        naive = list(model.generate(ids, max_tokens=5, temperature=0.0))
        end = next((i for i, token in enumerate(naive) if token in (BOS, END)), 5)
        assert text == tokenizer.decode([*ids[1:], *naive[:end]])
