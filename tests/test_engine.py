"""The engine against the model's naive `generate`, a scripted fake model, and the distributions it samples from."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.engine import PREFILL_BUDGET, Engine, KVCache, sample, uniform_sample
from nanochat.gpt import GPT, GPTConfig

SPECIALS = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")


class ByteTokenizer:
    """A byte is a token; special tokens come after the 256 bytes."""

    def encode_special(self, name):
        return 256 + SPECIALS.index(name.strip("<|>"))

    def get_bos_token_id(self):
        return self.encode_special("<|bos|>")

    def encode(self, text):
        return list(text.encode())

    def id_to_bytes(self, i):
        return bytes([i]) if i < 256 else f"<|{SPECIALS[i - 256]}|>".encode()

    def decode(self, ids):
        return b"".join(map(self.id_to_bytes, ids)).decode(errors="replace")


TOKENIZER = ByteTokenizer()
BOS, END, CALL, CALL_END, OUT, OUT_END = (TOKENIZER.encode_special(f"<|{name}|>") for name in SPECIALS)


def make_model(seed=0, **changes):
    """A small model in which every parameter has an effect; freshly initialised, many are zero."""
    config = GPTConfig(**{
        "sequence_len": 512, "vocab_size": 262, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64,
        "window_pattern": "QQSL", **changes,
    })  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights(dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.normal_(std=p.size(-1) ** -0.5 * (4 if name == "lm_head.weight" else 1))
        model.smear_lambda.fill_(0.7)
    return model.eval()


class Script:
    """A fake model: after each position the logits are nearly certain of one token, `next_token(tokens so far)`.

    The tokens are stored where a model stores its keys, so they follow whatever the engine does with its cache.
    """

    def __init__(self, next_token, sequence_len=64):
        self.config = SimpleNamespace(sequence_len=sequence_len, n_layer=1, n_head=1, n_kv_head=1, n_embd=4)
        self.next_token = next_token
        self.calls = []  # shape of the ids of every call
        self.seen = []  # tokens of each sequence in the last call

    def get_device(self):
        return torch.device("cpu")

    def hidden(self, ids, kv_cache, last_only=False):
        self.calls.append(tuple(ids.shape))
        self.seen = []
        for new, slot, length in zip(ids, kv_cache.slots.tolist(), kv_cache.cache_seqlens.tolist()):
            stored = kv_cache.k_cache[0, slot, :, 0, 0]
            stored[length : length + len(new)] = new
            self.seen.append(stored[: length + len(new)].int().tolist())
        kv_cache.advance(ids.size(1))
        return torch.zeros(*ids.shape, 4)

    def logits(self, hidden):
        logits = torch.full((len(hidden), 262), -1e9)
        for row, tokens in zip(logits, self.seen):
            row[self.next_token(tokens)] = 0.0
        return logits


def reply(tokens, prompt_length=1):
    """A fake model that replies to a prompt with `tokens` and END, whatever tool output comes in between."""

    def next_token(sequence):
        sampled, inside = 0, False
        for token in sequence[prompt_length:]:
            inside = inside or token == OUT
            sampled += not inside
            inside = inside and token != OUT_END
        return tokens[sampled] if sampled < len(tokens) else END

    return Script(next_token)


def run(engine, tokens, **options):
    """(columns, masks, finish reasons) of one `generate`."""
    steps, generator = [], engine.generate(tokens, **options)
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return *map(list, zip(*steps)), stop.value


def until_terminal(tokens):
    """Tokens up to and including the first terminal one."""
    ends = [i for i, token in enumerate(tokens) if token in (BOS, END)]
    return tokens[: ends[0] + 1] if ends else tokens


def naive(model, request):
    return until_terminal(list(model.generate(request["tokens"], request["max_tokens"], temperature=0.0)))


def finish(engine, **request):
    """Submit one request and run the engine until it has finished."""
    seq = engine.submit(**request)
    list(engine.finish())
    return seq


def alone(model, request):
    return finish(Engine(model, TOKENIZER, max_sequences=1), **request)


# -----------------------------------------------------------------------------
# The cache, and greedy output


def test_cache_has_the_compute_dtype_of_the_model():
    model = make_model()
    model.init_weights(dtype=torch.bfloat16)
    finish(engine := Engine(model, TOKENIZER), tokens=[BOS], max_tokens=3)
    assert engine.cache.k_cache.dtype == torch.bfloat16


def test_cache_shapes_and_bookkeeping():
    cache = KVCache(batch_size=3, num_heads=2, seq_len=10, head_dim=4, num_layers=5, device="cpu", dtype=torch.bfloat16)
    assert cache.k_cache.shape == cache.v_cache.shape == (5, 3, 10, 2, 4) and cache.k_cache.dtype == torch.bfloat16
    assert cache.cache_seqlens.tolist() == [0, 0, 0] and cache.cache_seqlens.dtype == torch.int32
    k, v = cache.get_layer_cache(2)
    k.fill_(1.0), v.fill_(2.0)
    assert cache.k_cache[2].eq(1).all() and cache.v_cache[2].eq(2).all() and not cache.k_cache[3].any()
    cache.advance(4)
    assert cache.get_pos() == 4 and cache.cache_seqlens.tolist() == [4, 4, 4]
    cache.last_tokens.fill_(7)
    cache.reset()
    assert cache.get_pos() == 0 and cache.last_tokens.tolist() == [-1, -1, -1]


def test_prefill_copies_one_sequence_into_all():
    one = KVCache(1, 2, 3, 4, 2, "cpu", torch.float32)
    one.k_cache.normal_(), one.v_cache.normal_()
    one.advance(3)
    one.last_tokens.fill_(5)
    many = KVCache(2, 2, 7, 4, 2, "cpu", torch.float32)
    many.prefill(one)
    for copied, source in ((many.k_cache, one.k_cache), (many.v_cache, one.v_cache)):
        assert all(torch.equal(copied[:, i, :3], source[:, 0]) for i in range(2)) and not copied[:, :, 3:].any()
    assert many.cache_seqlens.tolist() == [3, 3] and many.last_tokens.tolist() == [5, 5]
    with pytest.raises(AssertionError):
        many.prefill(one)  # no longer empty
    with pytest.raises(AssertionError):
        KVCache(1, 2, 2, 4, 2, "cpu", torch.float32).prefill(one)  # too short


@pytest.mark.parametrize("changes", [
    {},
    {"n_kv_head": 1},
    {"n_kv_head": 4, "window_pattern": "L"},
    {"window_pattern": "SSSL", "n_layer": 3},
    {"window_pattern": "QQQL", "n_layer": 1},
    {"sequence_len": 160},
])  # fmt: skip
@pytest.mark.parametrize("prompt_length", [1, 7, 150])
def test_greedy_equals_naive_generate(changes, prompt_length):
    model = make_model(**changes)
    prompt = [BOS] + torch.randint(256, (prompt_length - 1,), generator=torch.Generator().manual_seed(1)).tolist()
    length = min(30, model.config.sequence_len - prompt_length)  # crosses the quarter window of 128 or fills the context
    expected = naive(model, {"tokens": prompt, "max_tokens": length})
    columns, masks, reasons = run(Engine(model, TOKENIZER), prompt, num_samples=3, max_tokens=length, temperature=0.0)
    for i in range(3):
        assert until_terminal([column[i] for column in columns]) == expected
    assert len(set(expected)) > 5 or len(expected) < 10, "repeated tokens would test little"
    assert reasons == (["stop"] * 3 if expected[-1] in (BOS, END) else ["length"] * 3)
    assert all(mask == [1, 1, 1] for mask in masks)


# -----------------------------------------------------------------------------
# Sampling


def sample_one(logits, temperature, u, top_k=None, top_p=1.0):
    return sample(logits, [temperature], [top_k], [top_p], [u])[0].item()


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
    u = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    tokens, log_probs = sample(logits.expand(n, -1), [0.8] * n, [top_k] * n, [top_p] * n, u)
    counts = tokens.bincount(minlength=6)
    expected = expected_distribution(logits, 0.8, top_k, top_p)
    assert torch.allclose(log_probs.double(), expected[tokens].log(), atol=1e-5)
    assert not counts[expected == 0].any()
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-9)
    assert deviation[expected > 0].max() < 4  # standard errors


def test_sampling_a_row_does_not_depend_on_the_others():
    logits = torch.randn(60, 500, generator=torch.Generator().manual_seed(5)) * 3
    rng = random.Random(0)
    settings = [
        (rng.choice([0.0, 0.3, 1.0, 2.0]), rng.choice([None, 1, 5, 50, 64]), rng.choice([1.0, 0.5, 0.95]), rng.random())
        for _ in logits
    ]
    tokens, log_probs = sample(logits, *map(list, zip(*settings)))
    assert tokens.tolist() == [sample_one(row[None], t, u, k, p) for row, (t, k, p, u) in zip(logits, settings)]
    greedy = [i for i, (t, *_) in enumerate(settings) if t == 0]
    assert torch.equal(tokens[greedy], logits[greedy].argmax(-1)) and not log_probs[greedy].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_with_extreme_settings(dtype):
    logits = torch.tensor([[0.0, 15.0, -15.0, -float("inf")]], dtype=dtype)
    largest = 1 - 2**-23
    for temperature in (1e-30, 1e-3, 1.0, 1e3):
        for u in (0.0, 0.5, largest):
            assert sample_one(logits, temperature, u) in (0, 1, 2)
            assert sample_one(logits, temperature, u, top_p=1e-9) == 1
            assert sample_one(logits, temperature, u, top_k=1) == 1
    assert sample_one(logits, 1e-30, largest) == sample_one(logits, 0, 0.5) == 1


def test_uniform_samples_stay_below_the_total_in_float32():
    """The largest one times any total near one rounds to less than the total, so a token is always found."""
    totals = 1 + torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert (totals * torch.tensor(1 - 2**-23) < totals).all()
    samples = [uniform_sample(rng) for rng in [random.Random(0)] * 500]
    assert 0 <= min(samples) and max(samples) <= 1 - 2**-23 and 0.4 < sum(samples) / 500 < 0.6


def test_samples_depend_on_the_seed_and_not_on_their_number():
    engine = Engine(make_model(), TOKENIZER)
    options = {"max_tokens": 12, "temperature": 1.0, "top_k": 50}
    four, _ = engine.generate_batch([BOS, 65, 66], num_samples=4, seed=7, **options)
    two, _ = engine.generate_batch([BOS, 65, 66], num_samples=2, seed=7, **options)
    other, _ = engine.generate_batch([BOS, 65, 66], num_samples=4, seed=8, **options)
    assert two == four[:2]
    assert len({tuple(tokens) for tokens in four + other}) == 8, "neighbouring seeds share no sample"
    assert len({tokens[3] for tokens in four + other}) > 1, "the first token differs, too"


# -----------------------------------------------------------------------------
# Tool use, and how sequences end


def test_calculator_result_is_forced_with_mask_zero():
    sampled = [*b"=", CALL, *b"12*7", CALL_END, *b"!"]
    prompt = [BOS, *b"12*7?"]
    (sequence,), (mask,) = Engine(reply(sampled, len(prompt)), TOKENIZER).generate_batch(prompt, temperature=0.0)
    forced = [OUT, *b"84", OUT_END]
    assert sequence == [*prompt, *sampled[:-1], *forced, *b"!"]
    assert mask == [0] * len(prompt) + [1] * (len(sampled) - 1) + [0] * len(forced) + [1]


def test_sequences_of_one_batch_call_tools_independently():
    scripts = {ord("a"): reply([CALL, *b"1+1", CALL_END, *b"x"], 2), ord("b"): reply([*b"abcdefghij"], 2)}
    engine = Engine(Script(lambda tokens: scripts[tokens[1]].next_token(tokens)), TOKENIZER)
    caller, other = (engine.submit([BOS, letter], temperature=0.0) for letter in scripts)
    list(engine.finish())
    assert caller.generated == [CALL, *b"1+1", CALL_END, OUT, *b"2", OUT_END, *b"x", END]
    assert other.generated == [*b"abcdefghij", END]


@pytest.mark.parametrize("sampled", [
    [CALL, *b"1+1"],  # never closed
    [*b"1+1", CALL_END, *b"x"],  # never opened
    [CALL, *b"2**0.5 if", CALL_END, *b"x"],  # the calculator refuses it
])  # fmt: skip
def test_invalid_calls_force_nothing(sampled):
    (sequence,), (mask,) = Engine(reply(sampled), TOKENIZER).generate_batch([BOS], temperature=0.0)
    assert sequence == [BOS, *sampled] and mask == [0] + [1] * len(sampled)


@pytest.mark.parametrize("terminal", [END, BOS])
def test_terminal_tokens_are_yielded_by_generate_and_left_out_by_generate_batch(terminal):
    script = Script(lambda tokens: terminal if len(tokens) == 4 else 65)
    columns, masks, reasons = run(Engine(script, TOKENIZER), [BOS, 66], temperature=0.0)
    assert script.calls == [(1, 1)] * 4, "a chunk of the prompt, three tokens, and nothing after the end"
    assert columns == [[65], [65], [terminal]] and masks == [[1], [1], [1]] and reasons == ["stop"]
    (sequence,), (mask,) = Engine(script, TOKENIZER).generate_batch([BOS, 66], temperature=0.0)
    assert sequence == [BOS, 66, 65, 65] and mask == [0, 0, 1, 1]


def test_a_finished_sample_repeats_its_last_token_while_others_continue():
    options = {"num_samples": 40, "max_tokens": 60, "temperature": 3.0, "seed": 1}
    columns, masks, reasons = run(Engine(make_model(), TOKENIZER), [BOS], **options)
    assert set(reasons) == {"stop", "length"}, "the seed should give both kinds"
    for i, reason in enumerate(reasons):
        tokens = [column[i] for column in columns]
        length = len(until_terminal(tokens))
        assert [mask[i] for mask in masks] == [1] * length + [0] * (len(columns) - length)
        assert set(tokens[length:]) <= {tokens[length - 1]}
        assert (reason == "stop") == (tokens[length - 1] in (BOS, END))


def test_max_tokens_and_context_bound_the_length():
    engine = Engine(Script(lambda tokens: 65, sequence_len=20), TOKENIZER)
    cases = ((5, 5, "length"), (None, 17, "context"), (100, 17, "context"), (17, 17, "length"))
    for max_tokens, length, reason in cases:
        columns, _, reasons = run(engine, [BOS, 65, 66], max_tokens=max_tokens, temperature=0.0)
        assert len(columns) == length and reasons == [reason]
    with pytest.raises(UserError, match="the model's context is 5"):
        Engine(Script(lambda tokens: 65), TOKENIZER, context=5).submit([1] * 5)


def test_forced_tokens_count_towards_max_tokens():
    sampled = [CALL, *b"9*9", CALL_END]
    (sequence,), (mask,) = Engine(reply(sampled), TOKENIZER).generate_batch([BOS], max_tokens=6, temperature=0.0)
    assert sequence == [BOS, *sampled, OUT] and mask == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("arguments, message", [
    ({"tokens": []}, "empty"),
    ({"tokens": [1] * 64}, "64 tokens"),
    ({"tokens": [1], "num_samples": 0}, "num_samples is 0"),
    ({"tokens": [1], "max_tokens": 0}, "max_tokens is 0"),
    ({"tokens": [1], "temperature": -1.0}, "temperature is -1"),
    ({"tokens": [1], "temperature": float("nan")}, "temperature is nan"),
    ({"tokens": [1], "top_k": 0}, "top_k is 0"),
    ({"tokens": [1], "top_p": 0.0}, "top_p is 0"),
    ({"tokens": [1], "top_p": 1.1}, "top_p is 1.1"),
])  # fmt: skip
def test_invalid_arguments_are_refused_before_the_first_step(arguments, message):
    engine = Engine(Script(lambda tokens: 65), TOKENIZER)
    with pytest.raises(UserError, match=message):
        engine.submit(**arguments) if "top_p" in arguments else engine.generate(**arguments)


def test_generators_do_not_change_the_gradient_mode_of_their_consumers():
    model = make_model()
    for _ in Engine(model, TOKENIZER).generate([BOS], max_tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2]]), targets=torch.tensor([[2, 3]])).backward()


# -----------------------------------------------------------------------------
# Continuous batching


def requests_of(n, seed=0):
    rng = random.Random(seed)

    def request(i):
        prompt = [BOS, *(rng.randrange(256) for _ in range(rng.choice([0, 3, 40, 160])))]
        sampling = {"temperature": rng.choice([0.0, 0.7, 1.5]), "top_k": rng.choice([None, 20]), "top_p": rng.choice([1.0, 0.9])}
        return {"tokens": prompt, "max_tokens": rng.randint(1, 24), "seed": i, **sampling}

    return [request(i) for i in range(n)]


@pytest.mark.parametrize("max_sequences", [32, 5])
def test_a_sequence_is_the_same_alone_and_among_31_others(max_sequences):
    """They join one by one, share prefixes, and finish at different times."""
    model = make_model()
    engine = Engine(model, TOKENIZER, max_sequences=max_sequences)
    seqs = {}
    for request in requests_of(32):
        seqs[engine.submit(**request)] = request
        engine.step()
        assert engine.num_running <= max_sequences
    list(engine.finish())
    for seq, request in seqs.items():
        single = alone(model, request)
        assert (seq.generated, seq.masks, seq.finish_reason) == (single.generated, single.masks, single.finish_reason)
        if request["temperature"] == 0:
            assert seq.generated == naive(model, request)
    assert not engine.busy and engine.num_running == engine.num_waiting == 0
    assert engine.generated_tokens == sum(len(seq.generated) for seq in seqs)


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_prefill_in_chunks_changes_nothing(monkeypatch, budget):
    model = make_model()
    request = {"tokens": [BOS, *range(200)], "max_tokens": 8, "temperature": 0.0}
    monkeypatch.setitem(PREFILL_BUDGET, "cpu", budget)
    assert alone(model, request).generated == naive(model, request)


def test_the_next_turn_prefills_only_new_tokens_and_is_the_same():
    model = make_model()
    engine = Engine(model, TOKENIZER)
    first = finish(engine, tokens=[BOS, *range(60)], max_tokens=20, temperature=0.0)
    second = engine.submit([*first.tokens, *b"and then?"], max_tokens=20, temperature=0.0)
    other = engine.submit([BOS, *range(50), 99], max_tokens=20, temperature=0.0)  # has a common prefix with the first
    list(engine.finish())
    assert second.reused == len(first.tokens) - 1 and other.reused == 51
    assert engine.prefill_tokens == 60 + len(b"and then?")
    for seq in (second, other):
        assert seq.generated == naive(model, {"tokens": seq.tokens[: seq.prompt_length], "max_tokens": 20})


def test_a_cancelled_sequence_is_gone_and_the_others_are_unaffected():
    model = make_model()
    requests = [{**request, "max_tokens": 24} for request in requests_of(6, seed=3)]
    engine = Engine(model, TOKENIZER, max_sequences=3)
    seqs = [engine.submit(**request) for request in requests]
    for cancelled in (0, 4):  # one that is running, one that is waiting
        engine.step()
        engine.cancel(seqs[cancelled])
        assert seqs[cancelled].finish_reason == "cancelled"
        assert all(seq is not seqs[cancelled] for seq, _, _ in engine.step())
    list(engine.finish())
    engine.cancel(seqs[1])  # has finished: no effect
    for i in (1, 2, 3, 5):
        assert seqs[i].generated == alone(model, requests[i]).generated
        assert seqs[i].finish_reason in ("stop", "length")


def test_a_closed_generator_leaves_no_sequence_behind():
    engine = Engine(Script(lambda tokens: 65), TOKENIZER)
    generator = engine.generate([BOS], num_samples=3)
    next(generator)
    assert engine.num_running == 3
    generator.close()
    assert not engine.busy


def test_a_failed_step_cancels_all_sequences_and_the_engine_stays_usable():
    model = make_model()
    engine = Engine(model, TOKENIZER)
    request = {"tokens": [BOS, *range(100)], "max_tokens": 4, "temperature": 0.0}
    first = finish(engine, **request)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    seqs = [engine.submit([BOS, *range(100)]), engine.submit([BOS, 1])]
    hidden, model.hidden = model.hidden, fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    model.hidden = hidden
    assert [seq.finish_reason for seq in seqs] == ["cancelled"] * 2 and not engine.busy
    again = finish(engine, **request)
    assert again.generated == first.generated and again.reused == 0


def test_the_cache_grows_with_the_sequences_up_to_the_maximum():
    engine = Engine(Script(lambda tokens: 65, sequence_len=10), TOKENIZER, max_sequences=6)
    for sequences, capacity in ((1, 1), (2, 3), (3, 6), (20, 6)):  # new sequences prefer empty slots
        for i in range(sequences):
            engine.submit([BOS, sequences, i], temperature=0.0)
        list(engine.finish())
        assert engine.cache.k_cache.size(1) == capacity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_equal_the_naive_loop():
    model = make_model().to("cuda")
    model.set_compute_dtype(torch.float32)
    engine = Engine(model, TOKENIZER)
    seqs = {engine.submit(**request): request for request in requests_of(40, seed=1) if request["temperature"] == 0}
    list(engine.finish())
    assert all(seq.generated == naive(model, request) for seq, request in seqs.items())
    assert set(engine.graphs) >= {1, 2, 4, 8}
