"""The engine against the model's naive `generate`, a scripted fake model, and the distributions it samples from."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from tiny import BOS, END, ByteTokenizer, Script, tiny_gpt

from nanochat.common import UserError
from nanochat.engine import Engine, KVCache, largest, sample, uniform_sample

TOKENIZER = ByteTokenizer()
CALL, CALL_END, OUT, OUT_END = range(258, 262)


def make_model(**changes):
    options = {"sequence_len": 512, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "window_pattern": "QQSL", **changes}
    model = tiny_gpt(noise=0.1, head_std=0.5, **options)
    with torch.no_grad():
        if not model.config.plain:
            model.smear_lambda.fill_(0.7)
    return model.eval()


def script(tokens, prompt_length=1):
    """A fake model that replies to a prompt with `tokens` and END."""
    return Script(lambda sequence: [*tokens, END][len(sequence) - prompt_length])


def until_terminal(tokens):
    """Tokens up to and including the first terminal one."""
    ends = [i for i, token in enumerate(tokens) if token in (BOS, END)]
    return tokens[: ends[0] + 1] if ends else tokens


def naive(model, tokens, max_tokens):
    return until_terminal(list(model.generate(tokens, max_tokens, temperature=0.0)))


def finish(engine, **request):
    """Submit one request and run the engine until it has finished."""
    seq = engine.submit(**request)
    list(engine.finish())
    return seq


# -----------------------------------------------------------------------------
# The cache, and greedy output


def test_a_cache_prefills_another():
    one = KVCache(batch_size=1, num_heads=2, seq_len=3, head_dim=4, num_layers=5, device="cpu", dtype=torch.bfloat16)
    assert one.k_cache.shape == one.v_cache.shape == (5, 1, 3, 2, 4) and one.k_cache.dtype == torch.bfloat16
    one.get_layer_cache(2)[1].fill_(2.0)
    one.advance(3)
    one.last_tokens.fill_(5)
    many = KVCache(2, 2, 7, 4, 5, "cpu", torch.float32)
    many.prefill(one)  # one sequence into all
    assert many.v_cache[2, :, :3].eq(2).all() and many.v_cache.sum() == 2 * one.v_cache.sum() and not many.k_cache.any()
    assert many.cache_seqlens.tolist() == [3, 3] and many.cache_seqlens.dtype == torch.int32
    assert many.get_pos() == 3 and many.last_tokens.tolist() == [5, 5]
    many.reset()
    assert many.get_pos() == 0 and many.last_tokens.tolist() == [-1, -1]


@pytest.mark.parametrize("changes", [
    {},
    {"n_kv_head": 4, "window_pattern": "L"},
    {"plain": True},
    {"n_kv_head": 1, "window_pattern": "SSSL", "n_layer": 3},
    {"window_pattern": "QQQL", "n_layer": 1, "sequence_len": 160},
])  # fmt: skip
@pytest.mark.parametrize("prompt_length", [1, 150])
def test_greedy_output_equals_naive_generate(changes, prompt_length):
    model = make_model(**changes)
    prompt = [BOS] + torch.randint(256, (prompt_length - 1,), generator=torch.Generator().manual_seed(1)).tolist()
    # Crosses the quarter window of 128 or fills the context
    length = min(30, model.config.sequence_len - prompt_length)
    expected = naive(model, prompt, length)
    engine = Engine(model, TOKENIZER)
    sequences, masks = engine.generate_batch(prompt, num_samples=3, max_tokens=length, temperature=0.0)
    text = expected[:-1] if expected[-1] in (BOS, END) else expected
    assert sequences == [prompt + text] * 3 and masks == [[0] * prompt_length + [1] * len(text)] * 3
    assert len(set(expected)) > 5 or len(expected) < 10, "repeated tokens would test little"
    assert engine.prefill_tokens == prompt_length - 1, "samples of one prompt prefill it once"
    assert engine.cached_tokens == 2 * (prompt_length - 1)


# -----------------------------------------------------------------------------
# Sampling


def sample_one(logits, temperature, u, top_k=None, top_p=1.0):
    return sample(logits, [(temperature, top_k, top_p)], torch.tensor([u]))[0].item()


def expected_distribution(logits, temperature, top_k, top_p):
    """In float64: softmax, restricted to the k most likely tokens, then to the fewest of these that have mass p."""
    p, order = F.softmax(logits.double() / temperature, dim=-1).sort(descending=True)
    if top_k is not None:
        p[top_k:] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@pytest.mark.parametrize("top_k, top_p", [(None, 1.0), (3, 1.0), (None, 0.7), (4, 0.8), (5, 0.01), (500, 0.999)])
def test_sample_follows_the_distribution(top_k, top_p):
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.9]), 40_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits.expand(n, -1), [(0.8, top_k, top_p)] * n, u)
    counts = tokens.bincount(minlength=6)
    expected = expected_distribution(logits, 0.8, top_k, top_p)
    assert torch.allclose(log_probs.double(), expected[tokens].log(), atol=1e-5)
    assert not counts[expected == 0].any()
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-9)
    assert deviation[expected > 0].max() < 4  # standard errors


def test_sampling_one_row_does_not_depend_on_the_others():
    logits = torch.randn(60, 500, generator=torch.Generator().manual_seed(5)) * 3
    rng = random.Random(0)
    options = [0.0, 0.3, 1.0, 2.0], [None, 1, 5, 50, 64], [1.0, 0.5, 0.95]
    settings, u = [tuple(map(rng.choice, options)) for _ in logits], [rng.random() for _ in logits]
    tokens, log_probs = sample(logits, settings, torch.tensor(u))
    assert tokens.tolist() == [sample_one(row[None], t, u, k, p) for row, (t, k, p), u in zip(logits, settings, u)]
    greedy = [i for i, (t, *_) in enumerate(settings) if t == 0]
    assert torch.equal(tokens[greedy], logits[greedy].argmax(-1)) and not log_probs[greedy].any()


@pytest.mark.parametrize("k, V", [(1, 128), (5, 640), (5, 704), (50, 32768), (50, 1000), (64, 4096)])
def test_the_largest_logits_are_those_of_topk(k, V):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(k))
    logits[0, -1], logits[1, 70] = float("nan"), float("inf")
    for got, expected in zip(largest(logits, k), logits.topk(k)):
        assert torch.equal(got.nan_to_num(99), expected.nan_to_num(99))


def test_sampling_with_extreme_settings_finds_a_token():
    logits = torch.tensor([[0.0, 15.0, -15.0, -float("inf")]])
    largest = 1 - 2**-23
    for temperature in (5e-324, 1e-45, 1e-30, 1e-3, 1.0, 1e3, 1e300):  # the ends are 0, denormal and infinity in float32
        for u in (0.0, 0.5, largest):
            assert sample_one(logits, temperature, u) in ((1,) if temperature < 1e-2 else (0, 1, 2))
            for k, p in [(None, 1e-9), (None, 5e-324), (1, 1.0), (10**6, 1e-9)]:
                assert sample_one(logits, temperature, u, k, p) == 1
    # The largest uniform sample times any total near one is less than the total, so a token is always found
    totals = 1 + torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert (totals * torch.tensor(largest) < totals).all()
    samples = [uniform_sample(rng) for rng in [random.Random(0)] * 500]
    assert 0 <= min(samples) and max(samples) <= largest and 0.4 < sum(samples) / 500 < 0.6


def test_samples_depend_on_the_seed_and_not_on_their_number():
    engine = Engine(make_model(), TOKENIZER)

    def samples(n, seed):
        return engine.generate_batch([BOS, 65, 66], n, max_tokens=12, top_k=50, seed=seed)[0]

    four, other = samples(4, 7), samples(4, 8)
    assert samples(2, 7) == four[:2]
    assert len({tuple(tokens) for tokens in four + other}) == 8, "neighbouring seeds share no sample"


# -----------------------------------------------------------------------------
# Tool use, and how sequences end


@pytest.mark.parametrize("sampled, forced, rest", [
    ([*b"=", CALL, *b"12*7", CALL_END], [OUT, *b"84", OUT_END], [*b"!"]),
    ([CALL, *b"1+1"], [], []),  # never closed
    ([*b"1+1", CALL_END, *b"x"], [], []),  # never opened
    ([CALL, *b"2**0.5 if", CALL_END, *b"x"], [], []),  # the calculator refuses it
])  # fmt: skip
def test_the_result_of_a_valid_call_is_forced_with_mask_zero(sampled, forced, rest):
    prompt = [BOS, *b"12*7?"]
    model = script([*sampled, *b"?" * len(forced), *rest], len(prompt))
    expected = [*prompt, *sampled, *forced, *rest]
    expected_mask = [0] * len(prompt) + [1] * len(sampled) + [0] * len(forced) + [1] * len(rest)
    assert Engine(model, TOKENIZER).generate_batch(prompt, temperature=0.0) == ([expected], [expected_mask])
    # Forced tokens count towards max_tokens
    length = len(prompt) + len(sampled) + 1
    cropped = Engine(model, TOKENIZER).generate_batch(prompt, max_tokens=len(sampled) + 1, temperature=0.0)
    assert cropped == ([expected[:length]], [expected_mask[:length]])


@pytest.mark.parametrize("terminal", [END, BOS])
def test_terminal_tokens_are_yielded_by_generate_and_left_out_by_generate_batch(terminal):
    model = script([65, 65, terminal], prompt_length=2)
    columns = list(Engine(model, TOKENIZER).generate([BOS, 66], temperature=0.0))
    assert model.calls == [(1, 1)] * 4, "a chunk of the prompt, three tokens, and nothing after the end"
    assert columns == [([65], [1]), ([65], [1]), ([terminal], [1])]
    batch = Engine(model, TOKENIZER).generate_batch([BOS, 66], temperature=0.0)
    assert batch == ([[BOS, 66, 65, 65]], [[0, 0, 1, 1]])


def test_a_finished_sample_repeats_its_last_token_while_others_continue():
    options = {"num_samples": 40, "max_tokens": 60, "temperature": 3.0, "seed": 1}
    columns, masks = zip(*Engine(make_model(), TOKENIZER).generate([BOS], **options))
    lengths = [len(until_terminal(tokens)) for tokens in zip(*columns)]
    assert min(lengths) < max(lengths) == len(columns)
    for tokens, mask, length in zip(zip(*columns), zip(*masks), lengths):
        assert [*mask] == [1] * length + [0] * (len(columns) - length)
        assert set(tokens[length:]) <= {tokens[length - 1]}


@pytest.mark.parametrize("max_tokens, length, reason", [
    (5, 5, "length"), (None, 17, "context"), (100, 17, "context"), (17, 17, "length"),
])  # fmt: skip
def test_max_tokens_and_context_bound_the_length(max_tokens, length, reason):
    seq = finish(Engine(Script(lambda tokens: 65), TOKENIZER, context=20), tokens=[BOS, 65, 66], max_tokens=max_tokens)
    assert (len(seq.generated), seq.finish_reason) == (length, reason)


@pytest.mark.parametrize("name, values", {
    "tokens": [[], [1] * 64], "max_tokens": [0, -1], "temperature": [-1.0, float("nan"), float("inf")], "top_k": [0],
    "top_p": [0.0, 1.1],
}.items())  # fmt: skip
def test_invalid_arguments_are_refused(name, values):
    for value in values:
        message = f"{len(value)} tokens" if name == "tokens" else f"{name} ({value})"
        with pytest.raises(UserError, match=re.escape(message)):
            Engine(Script(lambda tokens: 65), TOKENIZER).submit(**{"tokens": [1], name: value})


def test_generators_leave_the_gradient_mode_alone_and_no_sequence_behind():
    engine = Engine(make_model(), TOKENIZER)
    generator = engine.generate([BOS], num_samples=3)
    next(generator)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and engine.num_running == 3
    generator.close()
    assert not engine.busy


# -----------------------------------------------------------------------------
# Continuous batching


def requests_of(n, seed=0):
    rng = random.Random(seed)
    root = [rng.randrange(256) for _ in range(160)]
    options = {"temperature": [0.0, 0.7, 1.5], "top_k": [None, 20], "top_p": [1.0, 0.9]}

    def request(i):
        prompt = [BOS, *root[: rng.choice([0, 3, 40, 160])], i]
        sampling = {name: rng.choice(values) for name, values in options.items()}
        return {"tokens": prompt, "max_tokens": rng.randint(1, 24), "seed": i, **sampling}

    return [request(i) for i in range(n)]


@pytest.mark.parametrize("max_sequences, budget", [(12, 128), (5, 30)])
def test_a_sequence_is_the_same_alone_and_among_others(max_sequences, budget):
    """They join one by one, share prefixes, continue others, and end at different times, some of them cancelled."""
    engine = Engine(model := make_model(), TOKENIZER, max_sequences=max_sequences)
    engine.scheduler.prefill_budget = budget
    seqs = {}
    for request in requests_of(12):
        cancelled = engine.submit([*request["tokens"], 7])
        seqs[engine.submit(**request)] = request
        engine.step()
        engine.cancel(cancelled)
        assert cancelled.finish_reason == "cancelled" and engine.num_running <= max_sequences
    list(engine.finish())
    for first in list(seqs)[-3:]:
        request = {"tokens": [*first.tokens, *b"and then?"], "max_tokens": 8, "temperature": 0.0}
        seqs[finish(engine, **request)] = request
    assert any(seq.reused > seq.prompt_length - 12 for seq in list(seqs)[-3:]), "the next turn prefills only new tokens"
    for seq, request in seqs.items():
        single = finish(Engine(model, TOKENIZER, max_sequences=1), **request)
        assert (seq.generated, seq.masks, seq.finish_reason) == (single.generated, single.masks, single.finish_reason)
        if request["temperature"] == 0:
            assert seq.generated == naive(model, request["tokens"], request["max_tokens"])
    assert not engine.busy and engine.num_running == engine.num_waiting == 0
    assert engine.generated_tokens >= sum(len(seq.generated) for seq in seqs)


def test_a_failed_step_cancels_all_sequences_and_the_engine_stays_usable(monkeypatch):
    engine = Engine(model := make_model(), TOKENIZER)
    request = {"tokens": [BOS, *range(100)], "max_tokens": 4, "temperature": 0.0}
    first = finish(engine, **request)
    seqs = [engine.submit([BOS, *range(100)]), engine.submit([BOS, 1])]
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(model, "hidden", None)
        engine.step()
    assert [seq.finish_reason for seq in seqs] == ["cancelled"] * 2 and not engine.busy
    again = finish(engine, **request)
    assert again.generated == first.generated and again.reused == 0


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_sequence_whose_logits_are_nan_fails_alone_and_leaves_a_clean_slot(settings):
    model = make_model()
    requests = [{"tokens": [first, *range(1, 20), 1], "max_tokens": 12, **settings} for first in (0, 30, 31)]
    expected = [finish(Engine(model, TOKENIZER), **request).generated for request in requests]
    with torch.no_grad():
        model.transformer.wte.weight[201] = float("nan")
    engine = Engine(model, TOKENIZER, max_sequences=2)
    bad = [engine.submit([*range(20), 201, *range(20)], **settings) for _ in range(3)]
    seqs = [engine.submit(**request) for request in requests[1:]]
    assert {*engine.finish()} == {*bad, *seqs} and {seq.finish_reason for seq in bad} == {"failed"}
    seqs.insert(0, finish(engine, **requests[0]))  # it starts as the bad ones, and may reuse nothing of them
    assert [seq.generated for seq in seqs] == expected


def test_the_cache_grows_with_the_sequences_in_the_dtype_of_the_model():
    engine = Engine(tiny_gpt(dtype=torch.bfloat16), TOKENIZER, max_sequences=6)
    for sequences, capacity in ((1, 1), (2, 3), (3, 6), (20, 6)):  # new sequences prefer empty slots
        for i in range(sequences):
            engine.submit([BOS, sequences, i], max_tokens=2)
        list(engine.finish())
        assert engine.cache.k_cache.size(1) == capacity and engine.cache.k_cache.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_equal_the_naive_loop():
    model = make_model().to("cuda")
    model.set_compute_dtype(torch.float32)
    engine = Engine(model, TOKENIZER)
    requests = [request for request in requests_of(40, seed=1) if request["temperature"] == 0]
    seqs = [engine.submit(**request) for request in requests]
    list(engine.finish())
    for seq, request in zip(seqs, requests):
        assert seq.generated == naive(model, request["tokens"], request["max_tokens"])
    assert set(engine.graphs) >= {1, 2, 4, 8}
