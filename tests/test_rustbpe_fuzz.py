"""Random texts and vocabularies: rustbpe must encode as tiktoken does and train as the reference does."""

import random
import time

import pytest
import rustbpe
import tiktoken
from test_rustbpe import BYTES, SPLIT_PATTERN, tokens_of, train_slowly, trained

ALPHABETS = ["abcdeETAOIN ", "abe ", " \t\n\r\x0b\x0c\x85\xa0\u2003\u2028\u3000\u200b\ufeff", "0123456789",
             "!?.,'/\\()[]{}<|>_\0\ufffd", ["'s", "'Ll", "don't", "\r\n", "e\u0301", "\u05e9\u05dc", "\u2167",
             "\U0001d7d8", "\u4f60", "\U0001f468\u200d\U0001f469"]]  # fmt: skip


def random_text(rng, size):
    text = ""
    while len(text) < size:
        first = rng.randrange(rng.choice([0x3000, 0x10FFE0]))
        part = "".join(rng.choices(rng.choice([*ALPHABETS, [chr(first + i) for i in range(32)]]), k=rng.randint(1, 8)))
        if rng.random() < 0.1:  # a long run
            part = part[: rng.randint(1, 2)] * min(size, rng.choice([2, 40, 20_000]))
        text += part.encode(errors="ignore").decode()  # without lone surrogates
    return text


def check_encoding(rng):
    segments = [*BYTES, *[bytes([byte]) for byte in b"aeotT \n1'!" * 50]]
    for _ in range(rng.choice([0, 5, 60, 400])):  # tokens, also ones that no merges reach
        segments.append((rng.choice(segments) + rng.choice(segments))[: rng.choice([2, 3, 200])])
    tokens = sorted(set(segments), key=lambda token: (len(token), token))
    ranks = dict(zip(tokens, range(len(tokens)) if rng.random() < 0.5 else rng.sample(range(len(tokens)), len(tokens))))
    texts = [random_text(rng, rng.choice([0, 1, 5, 50, 500, 30_000])) for _ in range(rng.choice([0, 1, 3, 12]))]
    expected = tiktoken.Encoding("fuzz", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids, offsets = rustbpe.Tokenizer.from_ranks(ranks).encode_to_numpy(texts, rng.choice([None, 1, 2, 17]))
    rows = [ids[start:end].tolist() for start, end in zip(offsets, offsets[1:])]
    assert rows == [expected.encode_ordinary(text) for text in texts]


def check_training(rng):
    alphabets = [rng.choice(ALPHABETS) for _ in range(rng.randint(0, 6))]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for alphabet in alphabets]
    assert tokens_of(trained(texts, 290, threads=rng.randint(1, 3))) == train_slowly(texts, 290)


@pytest.mark.parametrize("seconds", [2, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check", [check_encoding, check_training])
def test_random_input(check, seconds):
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        case += 1
        try:
            check(random.Random(f"{check.__name__} {case}"))
        except BaseException as error:
            raise AssertionError(f"case {case} failed") from error
