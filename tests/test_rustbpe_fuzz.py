"""Random input through the entry points of rustbpe: right answers (as tiktoken's or a reference's) or expected errors."""

import random
import time

import numpy as np
import pyarrow as pa
import pytest
import rustbpe
import tiktoken

from nanochat.tokenizer import SPLIT_PATTERN

if not hasattr(rustbpe, "Counts"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

ALLOWED = (ValueError, TypeError, OSError)  # UnicodeError is a ValueError
ALPHABETS = ["abcdeETAOIN ", "abe ", " \t\n\r\x0b\x0c\x85\xa0\u2003\u2028\u3000\u200b\ufeff", "0123456789", "!?.,'/\\()[]{}<|>_\0\ufffd",
             ["'s", "'Ll", "don't", "\r\n", "e\u0301", "\u05e9\u05dc", "\u2167", "\U0001d7d8", "\u4f60", "\U0001f468\u200d\U0001f469"]]  # fmt: skip


def random_text(rng, size):
    text = ""
    while len(text) < size:
        first = rng.randrange(rng.choice([0x3000, 0x10FFE0]))
        part = "".join(rng.choices(rng.choice([*ALPHABETS, [chr(first + i) for i in range(32)]]), k=rng.randint(1, 8)))
        if rng.random() < 0.1:  # a long run
            part = part[: rng.randint(1, 2)] * min(size, rng.choice([2, 40, 20_000]))
        text += part.encode(errors="ignore").decode()  # without lone surrogates
    return text


def random_ranks(rng):
    """All bytes and some longer tokens, also ones that no merge reaches; ids in any order, with gaps or without."""
    segments = [bytes([byte]) for byte in b"aeotT \n1'!\xc3\xe4" + random_text(rng, 20).encode()]
    for _ in range(rng.choice([0, 5, 60, 400])):
        segments.append((rng.choice(segments) + rng.choice(segments))[: rng.choice([2, 3, 200])])
    tokens = sorted({*segments, *(bytes([byte]) for byte in range(256))}, key=lambda token: (len(token), token))
    ids = rng.sample(range(rng.choice([len(tokens), len(tokens) + 50, 2**16, 2**16 + 1, 2**30])), len(tokens))
    return dict(zip(tokens, sorted(ids) if rng.random() < 0.5 else ids))


def check_encoding(rng):
    ranks, texts = random_ranks(rng), [random_text(rng, rng.choice([0, 1, 5, 50, 500, 30_000])) for _ in range(rng.choice([0, 1, 3, 12]))]
    expected = tiktoken.Encoding("fuzz", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    rows = [expected.encode_ordinary(text) for text in texts]
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
    assert [tokenizer.encode(text) for text in texts] == tokenizer.batch_encode(texts) == rows
    assert [tokenizer.decode(row) for row in rows] == texts
    for form in (texts, pa.array(texts, pa.string()), pa.array(texts, pa.large_string()), pa.chunked_array([texts[:2], [], texts[2:]], pa.string())):
        ids, offsets = tokenizer.encode_to_numpy(form, rng.choice([None, 1, 2, 17]))
        assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == rows


def check_wrong_arguments(rng):
    ranks, texts = random_ranks(rng), ["some text", "more"]
    tokenizer, trainer, counts = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN), rustbpe.Tokenizer(), rustbpe.Counts()
    wrong = [True, 0, -1, 2**64, 1.5, float("nan"), "", "\ud800", "a\0b", b"x", [], [["a"]], (), {"a": 1}, range(3), np.arange(3), None, object(),
             pa.array([1]), pa.array([b"a"]), pa.nulls(3), pa.table({"a": ["b"]})]  # fmt: skip
    for call, *good in rng.choices([
        (trainer.train_from_iterator, texts, 300, 1, SPLIT_PATTERN), (trainer.train_from_counts, counts, 300), (counts.add, texts, 2),
        (rustbpe.Tokenizer.from_ranks, ranks, SPLIT_PATTERN), (tokenizer.decode, [97]), (tokenizer.encode, "some text"),
        (tokenizer.batch_encode, texts), (tokenizer.encode_to_numpy, texts, 2), (rustbpe.Counts, SPLIT_PATTERN), (counts.merge, counts),
    ], k=12):  # fmt: skip
        try:
            call(*(value if rng.random() < 0.5 else rng.choice(wrong) for value in good))
        except ALLOWED:
            pass
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_to_numpy([random_text(rng, 20) + "\ud800x"])
    for unknown in ([-1], [2**30], [2**64]):
        with pytest.raises(ALLOWED):
            tokenizer.decode(unknown)
    del ranks[bytes([rng.randrange(256)])]
    with pytest.raises(ALLOWED):
        rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)


@pytest.mark.parametrize("seconds", [2, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check", [check_encoding, check_wrong_arguments])
def test_random_input(check, seconds):
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        case += 1
        try:
            check(random.Random(f"{check.__name__} {case}"))
        except BaseException as error:
            raise AssertionError(f"case {case} failed") from error
