"""Bits per byte against brute force in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import SAMPLE_PROMPTS, eval_batches, evaluate_bpb, sample_texts

CPU = Compute(torch.device("cpu"), torch.float32)
V = 40
# Ids 38 and 39 are special; the others stand for 1 to 5 bytes.
TOKEN_BYTES = torch.tensor([1 + i % 5 for i in range(38)] + [0, 0], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=32, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    return model


def make_batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(0, V, (3, 33), generator=generator)
        targets = ids[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.1] = -1
        yield ids[:, :-1].int(), targets, {"epoch": 1}


def brute_force(model, batches):
    nats, n_bytes = 0.0, 0
    for inputs, targets, _ in batches:
        with torch.no_grad():
            log_probabilities = F.log_softmax(model(inputs).double(), dim=-1)
        for b in range(targets.size(0)):
            for t in range(targets.size(1)):
                target = targets[b, t].item()
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats -= log_probabilities[b, t, target].item()
                    n_bytes += TOKEN_BYTES[target].item()
    return nats / n_bytes / math.log(2)


def test_bpb_equals_brute_force(model):
    expected = brute_force(model, make_batches(4))
    assert evaluate_bpb(model, make_batches(4), 4, TOKEN_BYTES, CPU) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_over_single_bytes_needs_eight_bits():
    def uniform(inputs, targets, loss_reduction):
        return torch.full(targets.shape, math.log(256))

    targets = torch.randint(0, 256, (2, 8))
    batches = [(targets, targets)]
    assert evaluate_bpb(uniform, batches, 1, torch.ones(256, dtype=torch.int32), CPU) == pytest.approx(8.0)
    # Tokens of two bytes at the same loss: half the bits.
    assert evaluate_bpb(uniform, batches, 1, torch.full((256,), 2), CPU) == pytest.approx(4.0)


def test_only_the_requested_number_of_batches_is_consumed(model):
    batches = make_batches(5)
    expected = brute_force(model, make_batches(2))
    assert evaluate_bpb(model, batches, 2, TOKEN_BYTES, CPU) == pytest.approx(expected, rel=1e-6)
    assert len(list(batches)) == 3


def test_bytes_and_nats_are_summed_over_ranks_before_division(model, run_ranks):
    def other_text():  # mostly special tokens: hardly any bytes
        for inputs, targets, state in make_batches(1, seed=2):
            yield inputs, torch.where(torch.arange(32) < 25, 39, targets), state

    def measure(compute):
        batches, steps = (make_batches(2), 2) if compute.is_main else (other_text(), 1)
        return evaluate_bpb(model, batches, steps, TOKEN_BYTES, compute)

    expected = brute_force(model, [*make_batches(2), *other_text()])
    assert run_ranks(2, measure) == [pytest.approx(expected, rel=1e-6)] * 2


@given(tokens=st.integers(1, 10**6), B=st.integers(1, 64), world_size=st.integers(1, 100))
def test_measurement_is_shared_completely_by_any_number_of_ranks(tokens, B, world_size):
    shares = [eval_batches(tokens, B, 32, dataclasses.replace(CPU, rank=r, world_size=world_size)) for r in range(world_size)]
    assert {rows for rows, _ in shares} == {max(1, tokens // 32)}
    rows, batches = shares[0][0], sum(batches for _, batches in shares)
    assert (batches - 1) * B < rows <= batches * B


def test_stop_is_polled_equally_often_on_all_ranks(model, run_ranks):
    polls = {}

    def measure(compute):
        def stop():
            polls[compute.rank] = polls.get(compute.rank, 0) + 1
            return any(compute.gather(polls[compute.rank] > 2))  # a collective, as in training

        steps = 2 if compute.is_main else 3
        return evaluate_bpb(model, make_batches(steps), steps, TOKEN_BYTES, compute, stop)

    assert run_ranks(2, measure) == [None, None]
    assert polls == {0: 3, 1: 3}
    unstopped = evaluate_bpb(model, make_batches(1), 1, TOKEN_BYTES, CPU, lambda: False)
    assert unstopped == pytest.approx(brute_force(model, make_batches(1)), rel=1e-6)


def test_bpb_without_any_text_is_infinite(model):
    special = torch.full((1, 4), 39)
    assert evaluate_bpb(model, [(special, special)], 1, TOKEN_BYTES, CPU) == math.inf


class Letters:
    """A fake tokenizer of characters; 0 is bos, 1 stands for all other special tokens."""

    def get_bos_token_id(self):
        return 0

    def encode_special(self, name):
        return 1

    def encode(self, texts, prepend):
        return [[prepend, *(2 + ord(c) % 36 for c in text)] for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_sample_texts_are_greedy_continuations(model):
    tokenizer = Letters()
    model = GPT(dataclasses.replace(model.config, sequence_len=80)).to_empty(device="cpu")
    torch.manual_seed(1)
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    texts = sample_texts(model, tokenizer, max_tokens=5)
    for ids, text in zip(tokenizer.encode(SAMPLE_PROMPTS, prepend=0), texts, strict=True):
        naive = list(model.generate(ids, max_tokens=5, temperature=0.0))
        end = next((i for i, token in enumerate(naive) if token in (0, 1)), 5)
        assert text == tokenizer.decode([*ids[1:], *naive[:end]])
