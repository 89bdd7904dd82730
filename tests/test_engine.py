"""The engine against the model's naive `generate`, against hand-written scripts, and against statistics."""

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
    """A small model whose every learned part does something: fresh weights leave many of them at zero."""
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
    """A fake for a model: after each position it is all but certain of the token that `say` names.

    `say(tokens)` gets one seq's tokens so far and gives the next token. The tokens are kept where a model
    keeps its keys, so they follow whatever the engine does with its cache.
    """

    def __init__(self, say, sequence_len=64):
        self.config = SimpleNamespace(sequence_len=sequence_len, n_layer=1, n_head=1, n_kv_head=1, n_embd=4)
        self.say = say
        self.calls = []  # shape of the ids of every call
        self.seen = []  # each seq's tokens in the last call

    def get_device(self):
        return torch.device("cpu")

    def hidden(self, ids, kv_cache, last_only=False):
        self.calls.append(tuple(ids.shape))
        self.seen = []
        for new, seq, length in zip(ids, kv_cache.slots.tolist(), kv_cache.cache_seqlens.tolist()):
            kept = kv_cache.k_cache[0, seq, :, 0, 0]
            kept[length : length + len(new)] = new
            self.seen.append(kept[: length + len(new)].int().tolist())
        kv_cache.advance(ids.size(1))
        return torch.zeros(*ids.shape, 4)

    def logits(self, hidden):
        logits = torch.full((len(hidden), 262), -1e9)
        for seq, tokens in zip(logits, self.seen):
            seq[self.say(tokens)] = 0.0
        return logits


def recite(text_tokens, prompt_length):
    """A `say` that recites fixed tokens after a prompt and then ends; what was forced in between is skipped over."""

    def say(tokens):
        spoken = strip_output(tokens[prompt_length:])
        return text_tokens[len(spoken)] if len(spoken) < len(text_tokens) else END

    return say


def strip_output(tokens):
    kept, inside = [], False
    for token in tokens:
        inside = inside or token == OUT
        if not inside:
            kept.append(token)
        inside = inside and token != OUT_END
    return kept


def run(engine, tokens, **options):
    """All columns of one generation, its masks, and why the seqs ended."""
    columns, masks = [], []

    def drain():
        return (yield from engine.generate(tokens, **options))

    generator = drain()
    while True:
        try:
            column, mask = next(generator)
        except StopIteration as stop:
            return columns, masks, stop.value
        columns.append(column)
        masks.append(mask)


def until_terminal(tokens):
    """Tokens up to the first that ends a reply, which is kept."""
    ends = [i for i, token in enumerate(tokens) if token in (BOS, END)]
    return tokens[: ends[0] + 1] if ends else tokens


# -----------------------------------------------------------------------------
# KV cache


def test_cache_shapes_and_bookkeeping():
    cache = KVCache(batch_size=3, num_heads=2, seq_len=10, head_dim=4, num_layers=5, device="cpu", dtype=torch.bfloat16)
    assert cache.k_cache.shape == cache.v_cache.shape == (5, 3, 10, 2, 4)
    assert cache.k_cache.dtype == torch.bfloat16
    assert cache.cache_seqlens.tolist() == [0, 0, 0] and cache.cache_seqlens.dtype == torch.int32
    k, v = cache.get_layer_cache(2)
    k.fill_(1.0), v.fill_(2.0)
    assert cache.k_cache[2].eq(1).all() and cache.v_cache[2].eq(2).all() and not cache.k_cache[3].any()
    cache.advance(4)
    assert cache.get_pos() == 4 and cache.cache_seqlens.tolist() == [4, 4, 4]
    cache.last_tokens.fill_(7)
    cache.reset()
    assert cache.get_pos() == 0 and cache.last_tokens.tolist() == [-1, -1, -1]


def test_prefill_copies_one_row_into_all():
    one = KVCache(1, 2, 3, 4, 2, "cpu", torch.float32)
    one.k_cache.normal_(), one.v_cache.normal_()
    one.advance(3)
    one.last_tokens.fill_(5)
    many = KVCache(2, 2, 7, 4, 2, "cpu", torch.float32)
    many.prefill(one)
    for seq in range(2):
        assert torch.equal(many.k_cache[:, seq, :3], one.k_cache[:, 0])
        assert torch.equal(many.v_cache[:, seq, :3], one.v_cache[:, 0])
    assert many.cache_seqlens.tolist() == [3, 3] and many.last_tokens.tolist() == [5, 5]
    assert not many.k_cache[:, :, 3:].any()
    with pytest.raises(AssertionError):
        many.prefill(one)  # no longer empty
    with pytest.raises(AssertionError):
        KVCache(1, 2, 2, 4, 2, "cpu", torch.float32).prefill(one)  # too short


# -----------------------------------------------------------------------------
# Greedy output equals the naive one


@pytest.mark.parametrize("changes", [
    {},
    {"n_kv_head": 1},
    {"n_kv_head": 4, "window_pattern": "L"},
    {"window_pattern": "SSSL", "n_layer": 3},
    {"window_pattern": "QQQL", "n_layer": 1},
])  # fmt: skip
@pytest.mark.parametrize("prompt_length", [1, 7, 150])
def test_greedy_equals_naive_generate(changes, prompt_length):
    model = make_model(**changes)
    prompt = [BOS] + torch.randint(256, (prompt_length - 1,), generator=torch.Generator().manual_seed(1)).tolist()
    # 30 tokens from 150 on cross the quarter window of 128.
    naive = list(model.generate(prompt, max_tokens=30, temperature=0.0))
    columns, masks, reasons = run(Engine(model, TOKENIZER), prompt, num_samples=3, max_tokens=30, temperature=0.0)
    expected = until_terminal(naive)
    for seq in range(3):
        tokens = until_terminal([column[seq] for column in columns])
        assert tokens == expected
    assert len(set(expected)) > 5 or len(expected) < 10, "a model that repeats itself would test little"
    assert reasons == (["stop"] * 3 if expected[-1] in (BOS, END) else ["length"] * 3)
    assert all(mask == [1, 1, 1] for mask in masks)


def test_greedy_equals_naive_generate_up_to_a_full_context():
    model = make_model(sequence_len=160)
    prompt = list(range(100, 110))
    naive = list(model.generate(prompt, max_tokens=150, temperature=0.0))
    columns, _, reasons = run(Engine(model, TOKENIZER), prompt, temperature=0.0)
    expected = until_terminal(naive)
    assert [token for (token,) in columns] == expected
    assert reasons == (["stop"] if expected[-1] in (BOS, END) else ["context"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_takes_the_compute_dtype_of_the_model(dtype):
    model = make_model()
    model.init_weights(dtype=dtype)
    assert Engine(model, TOKENIZER)._make_cache(1, 8).k_cache.dtype == dtype
    assert len(Engine(model, TOKENIZER).generate_batch([BOS], max_tokens=3)[0][0]) >= 1


# -----------------------------------------------------------------------------
# Sampling


def draw_many(logits, n, temperature, top_k=None, top_p=1.0, seed=0):
    """n tokens of one distribution, in one call, and the log-probability that each is said to have."""
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sample(logits.expand(n, -1), [temperature] * n, [top_k] * n, [top_p] * n, draws)


def pick(logits, temperature, draw, top_k=None, top_p=1.0):
    return sample(logits, [temperature], [top_k], [top_p], [draw])[0].item()


def by_hand(logits, temperature, top_k, top_p):
    """The distribution in float64: softmax of the k likeliest, of which the fewest that have mass p stay."""
    p, order = F.softmax(logits.double() / temperature, dim=-1).sort(descending=True)
    if top_k is not None:
        p[top_k:] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@pytest.mark.parametrize("top_k, top_p", [(None, 1.0), (3, 1.0), (None, 0.7), (4, 0.8), (5, 0.01), (500, 0.999)])
def test_sample_follows_the_distribution(top_k, top_p):
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.9]), 40_000
    tokens, log_probs = draw_many(logits, n, 0.8, top_k, top_p)
    counts = tokens.bincount(minlength=6)
    expected = by_hand(logits, 0.8, top_k, top_p)
    assert torch.allclose(log_probs.double(), expected[tokens].log(), atol=1e-5)
    assert not counts[expected == 0].any()
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-9)
    assert deviation[expected > 0].max() < 4  # standard errors


def test_sample_top_k_keeps_exactly_the_k_likeliest():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw_many(logits, 5000, 5.0, top_k=7)
    assert set(tokens.tolist()) == set(logits.topk(7).indices.tolist())
    assert pick(logits[None], 1.0, 0.99, top_k=1) == int(logits.argmax())
    # a k beyond the vocabulary cuts nothing
    assert torch.equal(draw_many(logits, 5000, 5.0, top_k=2000)[0], draw_many(logits, 5000, 5.0)[0])


def test_rows_with_settings_of_their_own_are_sampled_as_if_alone():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(60, 500, generator=generator) * 3
    rng = random.Random(0)
    settings = [
        (rng.choice([0.0, 0.3, 1.0, 2.0]), rng.choice([None, 1, 5, 50, 64]), rng.choice([1.0, 0.5, 0.95]), rng.random())
        for _ in logits
    ]
    tokens, log_probs = sample(logits, *map(list, zip(*settings)))
    together = tokens.tolist()
    alone = [pick(seq[None], t, draw, k, p) for seq, (t, k, p, draw) in zip(logits, settings)]
    assert together == alone
    greedy = [seq for seq, (t, *_) in enumerate(settings) if t == 0]
    assert greedy and [together[seq] for seq in greedy] == logits[greedy].argmax(-1).tolist()
    assert not log_probs[greedy].any() and log_probs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_at_its_edges(dtype):
    logits = torch.tensor([[0.0, 15.0, -15.0, -float("inf")]], dtype=dtype)
    largest = 1 - 2**-23
    for temperature in (1e-30, 1e-3, 1.0, 1e3):
        for draw in (0.0, 0.5, largest):
            assert pick(logits, temperature, draw) in (0, 1, 2)
            assert pick(logits, temperature, draw, top_p=1e-9) == 1
    assert pick(logits, 1e-30, largest) == 1
    assert pick(logits, 0, 0.5) == 1


def test_draws_stay_below_the_total_in_float32():
    """The largest draw times any total near one rounds to less than the total, so a token is always found."""
    totals = 1 + torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert (totals * torch.tensor(1 - 2**-23) < totals).all()
    rng = random.Random(0)
    draws = [uniform_sample(rng) for _ in range(500)]
    assert 0 <= min(draws) and max(draws) <= 1 - 2**-23 and 0.4 < sum(draws) / 500 < 0.6


def test_a_row_depends_on_its_seed_and_not_on_its_neighbours():
    model = make_model()
    engine = Engine(model, TOKENIZER)
    options = {"max_tokens": 12, "temperature": 1.0, "top_k": 50}
    four, _ = engine.generate_batch([BOS, 65, 66], num_samples=4, seed=7, **options)
    two, _ = engine.generate_batch([BOS, 65, 66], num_samples=2, seed=7, **options)
    other, _ = engine.generate_batch([BOS, 65, 66], num_samples=4, seed=8, **options)
    assert two == four[:2]
    assert len({tuple(seq) for seq in four + other}) == 8  # neighbouring seeds do not share seqs either
    assert len({seq[3] for seq in four + other}) > 1  # the first token is drawn per seq too


# -----------------------------------------------------------------------------
# Tool use


def test_calculator_result_is_forced_with_mask_zero():
    spoken = [*b"=", CALL, *b"12*7", CALL_END, *b"!"]
    prompt = [BOS, *b"12*7?"]
    engine = Engine(Script(recite(spoken, len(prompt))), TOKENIZER)
    (sequence,), (mask,) = engine.generate_batch(prompt, temperature=0.0)
    forced = [OUT, *b"84", OUT_END]
    assert sequence == [*prompt, *spoken[:-1], *forced, *b"!"]
    assert mask == [0] * len(prompt) + [1] * (len(spoken) - 1) + [0] * len(forced) + [1]


def test_rows_call_tools_on_their_own():
    """Two seqs of one batch, one in a call while the other is not: only the caller is forced."""
    start = {0: [CALL, *b"1+1", CALL_END, *b"x"], 1: [*b"abcdefghij"]}

    def say(tokens):
        spoken = strip_output(tokens[1:])
        if not spoken:
            return CALL if not say.called else ord("a")
        script = start[0] if spoken[0] == CALL else start[1]
        return script[len(spoken)] if len(spoken) < len(script) else END

    class TwoWays(Script):
        """Both ways to begin are equally likely, so that the seed decides."""

        def logits(self, hidden):
            logits = super().logits(hidden)
            if self.seen[0] == [BOS]:
                logits[:, ord("a")] = logits[:, CALL]
            return logits

    say.called = False
    sequences, masks = Engine(TwoWays(say), TOKENIZER).generate_batch([BOS], num_samples=8, temperature=1.0)
    calling = [BOS, CALL, *b"1+1", CALL_END, OUT, *b"2", OUT_END, *b"x"]
    plain = [BOS, *b"abcdefghij"]
    assert all(sequence in (calling, plain) for sequence in sequences)
    assert calling in sequences and plain in sequences
    assert [mask.count(0) for mask in masks] == [4 if sequence == calling else 1 for sequence in sequences]


def test_a_call_that_is_never_closed_and_an_end_without_a_start_force_nothing():
    for spoken in ([CALL, *b"1+1"], [*b"1+1", CALL_END, *b"x"], [CALL, *b"1+", CALL, *b"2", CALL_END]):
        (sequence,), (mask,) = Engine(Script(recite(spoken, 1)), TOKENIZER).generate_batch([BOS], temperature=0.0)
        if spoken.count(CALL) == 2:  # a second start begins the call anew: "2" is what is computed
            assert sequence == [BOS, *spoken, OUT, *b"2", OUT_END]
        else:
            assert sequence == [BOS, *spoken] and mask == [0] + [1] * len(spoken)


# -----------------------------------------------------------------------------
# How seqs end


@pytest.mark.parametrize("terminal", [END, BOS])
def test_terminal_tokens_are_yielded_by_generate_and_left_out_by_generate_batch(terminal):
    script = Script(lambda tokens: terminal if len(tokens) == 4 else 65)
    columns, masks, reasons = run(Engine(script, TOKENIZER), [BOS, 66], temperature=0.0)
    assert columns == [[65], [65], [terminal]] and masks == [[1], [1], [1]] and reasons == ["stop"]
    (sequence,), (mask,) = Engine(script, TOKENIZER).generate_batch([BOS, 66], temperature=0.0)
    assert sequence == [BOS, 66, 65, 65] and mask == [0, 0, 1, 1]


def test_a_finished_row_repeats_its_end_while_others_go_on():
    model = make_model()
    options = {"num_samples": 40, "max_tokens": 60, "temperature": 3.0, "seed": 1}
    columns, masks, reasons = run(Engine(model, TOKENIZER), [BOS], **options)
    assert set(reasons) == {"stop", "length"}, "the seed should give both kinds"
    for seq, reason in enumerate(reasons):
        tokens = [column[seq] for column in columns]
        length = len(until_terminal(tokens))
        assert [mask[seq] for mask in masks] == [1] * length + [0] * (len(columns) - length)
        assert set(tokens[length:]) <= {tokens[length - 1]}
        assert (reason == "stop") == (tokens[length - 1] in (BOS, END))


def test_generation_stops_when_every_row_has_ended():
    script = Script(lambda tokens: END)
    columns, _, _ = run(Engine(script, TOKENIZER), [BOS], num_samples=3, temperature=0.0)
    assert columns == [[END] * 3]
    assert script.calls == [(3, 1)]  # and nothing after the end


def test_max_tokens_and_context_bound_the_length():
    chatter = Script(lambda tokens: 65, sequence_len=20)
    engine = Engine(chatter, TOKENIZER)
    cases = ((5, 5, "length"), (None, 17, "context"), (100, 17, "context"), (17, 17, "length"))
    for max_tokens, length, reason in cases:
        columns, _, reasons = run(engine, [BOS, 65, 66], max_tokens=max_tokens, temperature=0.0)
        assert len(columns) == length and reasons == [reason]


def test_forced_tokens_count_and_stop_at_the_limit():
    spoken = [CALL, *b"9*9", CALL_END]
    engine = Engine(Script(recite(spoken, 1)), TOKENIZER)
    (sequence,), (mask,) = engine.generate_batch([BOS], max_tokens=6, temperature=0.0)
    assert sequence == [BOS, *spoken, OUT] and mask == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("arguments, says", [
    ({"tokens": []}, "empty"),
    ({"tokens": [1] * 64}, "64 tokens"),
    ({"tokens": [1] * 900}, "900 tokens"),
    ({"tokens": [1], "num_samples": 0}, "num_samples is 0"),
    ({"tokens": [1], "max_tokens": 0}, "max_tokens is 0"),
    ({"tokens": [1], "temperature": -1.0}, "temperature is -1"),
    ({"tokens": [1], "temperature": float("nan")}, "temperature is nan"),
    ({"tokens": [1], "top_k": 0}, "top_k is 0"),
])  # fmt: skip
def test_arguments_that_cannot_work_are_refused_at_once(arguments, says):
    engine = Engine(Script(lambda tokens: 65), TOKENIZER)
    with pytest.raises(UserError, match=says):
        engine.generate(**arguments)  # before the first step
    with pytest.raises(UserError, match=says):
        engine.generate_batch(**arguments)


def test_the_readers_of_a_generator_keep_their_gradients():
    """No mode of the engine's leaks out between two tokens: training may go on in between."""
    model = make_model()
    for _ in Engine(model, TOKENIZER).generate([BOS], max_tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2]]), targets=torch.tensor([[2, 3]])).backward()


# -----------------------------------------------------------------------------
# Many at once


def spoken(model, request):
    """What a request gets from an engine of its own."""
    engine = Engine(model, TOKENIZER, max_sequences=1)
    seq = engine.submit(**request)
    list(engine.finish())
    return seq


def requests_of(n, seed=0):
    rng = random.Random(seed)
    return [
        {
            "tokens": [BOS, *(rng.randrange(256) for _ in range(rng.choice([0, 3, 40, 160])))],
            "max_tokens": rng.randint(1, 24),
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "top_k": rng.choice([None, 20]),
            "top_p": rng.choice([1.0, 0.9]),
            "seed": i,
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("max_sequences", [32, 5])
def test_a_row_says_the_same_alone_and_among_31_others(max_sequences):
    """They join one by one while others write, share beginnings, and leave at different times."""
    model = make_model()
    requests = requests_of(32)
    engine = Engine(model, TOKENIZER, max_sequences=max_sequences)
    seqs = []
    for request in requests:
        seqs.append(engine.submit(**request))
        engine.step()
        assert engine.num_running <= max_sequences
    list(engine.finish())
    for seq, request in zip(seqs, requests):
        alone = spoken(model, request)
        assert (seq.generated, seq.masks, seq.finish_reason) == (alone.generated, alone.masks, alone.finish_reason)
        if request["temperature"] == 0:
            naive = list(model.generate(request["tokens"], request["max_tokens"], temperature=0.0))
            assert seq.generated == until_terminal(naive)
    assert not engine.busy and engine.num_running == engine.num_waiting == 0
    assert engine.generated_tokens == sum(len(seq.generated) for seq in seqs)


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_pieces_in_which_a_prompt_is_read_do_not_matter(monkeypatch, budget):
    model = make_model()
    prompt = [BOS, *range(200)]
    naive = list(model.generate(prompt, max_tokens=8, temperature=0.0))
    monkeypatch.setitem(PREFILL_BUDGET, "cpu", budget)
    assert spoken(model, {"tokens": prompt, "max_tokens": 8, "temperature": 0.0}).generated == until_terminal(naive)


def test_the_next_turn_reads_only_what_is_new_and_says_the_same():
    model = make_model()
    engine = Engine(model, TOKENIZER)
    first = engine.submit([BOS, *range(60)], max_tokens=20, temperature=0.0)
    list(engine.finish())
    assert (engine.prefill_tokens, engine.cached_tokens) == (60, 0)
    turn = [*first.tokens, *b"and then?"]
    second = engine.submit(turn, max_tokens=20, temperature=0.0)
    other = engine.submit([BOS, *range(50), 99], max_tokens=20, temperature=0.0)  # begins alike, too
    list(engine.finish())
    assert second.reused == len(first.tokens) - 1 and other.reused == 51
    assert engine.prefill_tokens == 60 + len(b"and then?")
    for seq in (second, other):
        naive = model.generate(seq.tokens[: seq.prompt_length], max_tokens=20, temperature=0.0)
        assert seq.generated == until_terminal(list(naive))


def test_a_cancelled_row_is_gone_and_the_others_do_not_notice():
    model = make_model()
    requests = requests_of(6, seed=3)
    engine = Engine(model, TOKENIZER, max_sequences=3)
    seqs = [engine.submit(**{**request, "max_tokens": 24}) for request in requests]
    for victim in (0, 4):  # one that writes, one that waits
        engine.step()
        engine.cancel(seqs[victim])
        assert seqs[victim].finish_reason == "cancelled"
        assert all(seq is not seqs[victim] for seq, _, _ in engine.step())
    list(engine.finish())
    engine.cancel(seqs[1])  # has ended by itself: nothing happens
    for i in (1, 2, 3, 5):
        assert seqs[i].generated == spoken(model, {**requests[i], "max_tokens": 24}).generated
        assert seqs[i].finish_reason in ("stop", "length")


def test_an_abandoned_generator_leaves_no_row_behind():
    engine = Engine(Script(lambda tokens: 65), TOKENIZER)
    generator = engine.generate([BOS], num_samples=3)
    next(generator)
    assert engine.num_running == 3
    generator.close()
    assert not engine.busy
    engine.generate([BOS])  # never read from
    assert not engine.busy


def test_two_generators_may_take_turns():
    model = make_model()
    prompts = ([BOS, *b"one"], [BOS, *b"another"])
    expected = [Engine(model, TOKENIZER).generate_batch(prompt, 2, 10, seed=4)[0] for prompt in prompts]
    engine = Engine(model, TOKENIZER)
    said = [[[], []], [[], []]]
    generators = [engine.generate(prompt, 2, 10, seed=4) for prompt in prompts]
    for columns in zip(*generators):
        for seqs, (column, _) in zip(said, columns):
            for seq, token in zip(seqs, column):
                seq.append(token)
    for prompt, seqs, sequences in zip(prompts, said, expected):
        for seq, sequence in zip(seqs, sequences):
            assert [*prompt, *seq][: len(sequence)] == sequence


def test_text_that_stops_a_row():
    story = [*"It was cold. The énd is near. Really.".encode()]
    for stop, expected in (("énd", "It was cold. The énd"), ("cold. T", "It was cold. T"), ("absent", None), ("R", None)):
        engine = Engine(Script(recite(story, 1)), TOKENIZER)
        seq = engine.submit([BOS], temperature=0.0, stop=["zzz", stop] if stop != "R" else [])
        list(engine.finish())
        text = TOKENIZER.decode([token for token in seq.generated if token != END])
        assert text == (expected or TOKENIZER.decode(story)) and seq.finish_reason == "stop"


def test_text_of_a_tool_does_not_stop_a_row():
    said = [*b"a", CALL, *b"11+1", CALL_END, *b"b12c"]
    engine = Engine(Script(recite(said, 1)), TOKENIZER)
    seq = engine.submit([BOS], temperature=0.0, stop=["11", "ab", "12c"])
    list(engine.finish())
    assert seq.generated == [*b"a", CALL, *b"11+1", CALL_END, OUT, *b"12", OUT_END, *b"b12c"]


def test_a_round_that_fails_ends_all_rows_and_the_engine_goes_on():
    model = make_model()
    engine = Engine(model, TOKENIZER)
    first = engine.submit([BOS, *range(100)], max_tokens=4, temperature=0.0)
    list(engine.finish())

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    seqs = [engine.submit([BOS, *range(100)]), engine.submit([BOS, 1])]
    hidden, model.hidden = model.hidden, fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    model.hidden = hidden
    assert [seq.finish_reason for seq in seqs] == ["cancelled"] * 2 and not engine.busy
    again = engine.submit([BOS, *range(100)], max_tokens=4, temperature=0.0)
    list(engine.finish())
    assert again.generated == first.generated and again.reused == 0


def test_the_cache_grows_with_the_sequences_up_to_the_maximum():
    engine = Engine(Script(lambda tokens: 65, sequence_len=10), TOKENIZER, max_sequences=6)
    for wanted, capacity in ((1, 1), (2, 3), (3, 6), (20, 6)):  # newcomers prefer places that hold nothing yet
        for i in range(wanted):
            engine.submit([BOS, wanted, i], temperature=0.0)
        list(engine.finish())
        assert engine.cache.k_cache.size(1) == capacity
    with pytest.raises(UserError, match="the model's context is 5"):
        Engine(Script(lambda tokens: 65), TOKENIZER, context=5).submit([1] * 5)


@pytest.mark.parametrize("arguments, says", [({"top_p": 0.0}, "top_p is 0"), ({"top_p": 1.1}, "top_p is 1.1")])
def test_submit_refuses_what_generate_does_not_know(arguments, says):
    with pytest.raises(UserError, match=says):
        Engine(Script(lambda tokens: 65), TOKENIZER).submit([BOS], **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_on_a_gpu_say_what_the_naive_loop_says():
    model = make_model().to("cuda")
    model.set_compute_dtype(torch.float32)
    requests = [request for request in requests_of(40, seed=1) if request["temperature"] == 0]
    engine = Engine(model, TOKENIZER)
    seqs = [engine.submit(**request) for request in requests]
    list(engine.finish())
    for seq, request in zip(seqs, requests):
        naive = list(model.generate(request["tokens"], request["max_tokens"], temperature=0.0))
        assert seq.generated == until_terminal(naive)
    assert set(engine.graphs) >= {1, 2, 4, 8}
