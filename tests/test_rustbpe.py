"""Our rustbpe against slow reference implementations and tiktoken: training, the split into words, ids, bad input.

Neither library returns words; with a token for every pair of bytes in random order, the ids show where words end.
"""

import os
import random
import runpy
import shutil
import subprocess
from collections import Counter
from itertools import product

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from test_tokenizer import assigned, encode_slowly

from nanochat.tokenizer import SPLIT_PATTERN

if not hasattr(rustbpe, "PATTERN"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

BYTES = {bytes([byte]): byte for byte in range(256)}

# -----------------------------------------------------------------------------
# Training

corpora = st.one_of(
    st.lists(st.text("ab ", max_size=20), max_size=6),
    st.lists(st.sampled_from(["aaaa", "aa", "aaaaaaab", "ab" * 9, "abc", " ", "", "a" * 33, "baaab"]), max_size=12),
    st.lists(st.text(assigned, max_size=15), max_size=5),
)


def train_slowly(texts, vocab_size):
    """The reference implementation of training: tokens in the order in which they are learned.

    Each merge counts all pairs again and takes the most frequent; ties go to the lowest first, then second, id.

        train_slowly(["aaab aab"], 258)[256:] == [b"aa", b"ab"]
    """
    counts = Counter(word for text in texts for word in regex.findall(SPLIT_PATTERN, text))
    words = [([*word.encode()], count) for word, count in counts.items()]
    tokens = [*BYTES]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:]):  # in "aaa" the pair "aa" counts twice, though it is merged once
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def trained(texts, vocab_size=300, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def tokens_of(tokenizer):
    return [token for token, _ in tokenizer.get_mergeable_ranks()]


@settings(max_examples=500, deadline=None)
@given(corpora, st.integers(256, 290), st.integers(1, 3), st.integers(1, 20))
def test_training_equals_the_reference(texts, vocab_size, threads, batch_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rustbpe, "BATCH_CHARS", batch_chars)
        patch.setattr(rustbpe, "MERGES", 1 + batch_chars)
        assert tokens_of(trained(texts, vocab_size, threads=threads)) == train_slowly(texts, vocab_size)


def test_training_on_documents_equals_the_reference():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "nanochat" / "engine.py")]
    assert tokens_of(trained(texts * 40, 400, threads=3)) == train_slowly(texts, 400)


# -----------------------------------------------------------------------------
# Words and ids

CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates, which no text has
# Every pair of bytes is a token, in random order
PAIRS = {bytes([i >> 8, i & 255]): 256 + int(n) for i, n in enumerate(np.random.default_rng(0).permutation(65536))}

# Characters on which the pattern depends, which are rare in hypothesis' own texts
KINDS = {
    "blanks": " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e\u200b\ufeff",
    "contractions": ["'", "'", "’", *"sStTmMdDſaA 1", "ll", "Ll", "lL", "re", "RE", "vE", "Ve", "l", "r", "v", "\n"],
    "letters and marks": "aAzßǅᾈΑλʰªºـאه中ㄅ\u0301\u0903\u20dd\u1ab0 '1ſſK",
    "digits": "01239٣१৪Ⅷ½①๑𝟘²一 a.",
    "signs": "/!?.,…¿\"'-_$€+^`~🙂\u200d\ufe0f\U0001f3fd\r\n\n// aA1",
}
small_tokens = st.binary(min_size=2, max_size=6) | st.text("ab ", min_size=2, max_size=7).map(str.encode)
pieces = st.one_of([st.sampled_from(kind) for kind in KINDS.values()] + [st.sampled_from(["'s", " ", "a", "\n"])])


def texts_of(characters):
    kinds = (st.lists(st.sampled_from(kind), max_size=25) for kind in KINDS.values())
    mixtures = st.lists(pieces | characters, max_size=25)
    return st.one_of(st.text(characters, max_size=30), *(parts.map("".join) for parts in (*kinds, mixtures)))


def tiktoken_with(ranks):
    return tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_character_classes_are_those_of_tiktoken():
    generator = runpy.run_path(str(ROOT / "rustbpe" / "unicode.py"))
    assert generator["table"]() == generator["TABLE"].read_text(), "run rustbpe/unicode.py and build again"


def test_every_character_in_every_place():
    """Each character between letters, blanks, digits, line breaks and apostrophes, and contractions of all kinds. Han,
    Hangul, unassigned and private characters stand before a letter only: it takes long."""
    few = [c for c in CODE_POINTS if c < 0x3400 or 0xA000 <= c < 0xAC00 or 0xD7A4 <= c < 0x20000 or c >= 0xE0000]
    few = [c for c in few if c < 0x3400 or chr(c).isprintable()]
    texts = ["".join(f"{chr(c)}a" for c in CODE_POINTS[i : i + 2**12]) for i in range(0, len(CODE_POINTS), 2**12)]
    for i in range(0, len(few), 2**10):
        characters = map(chr, few[i : i + 2**10])
        texts.append("".join(f"a{c}B{c} {c}1{c}\n{c}{c}'S{c}'{c}!{c}\n/{c}  {c}" for c in characters))
    texts.append(" ".join("a'" + "".join(letters) for letters in product("sdmtlvrexSDMTLVREſ", repeat=3)))
    ids, offsets = rustbpe.Tokenizer.from_ranks(BYTES | PAIRS).encode_to_numpy(texts)
    encoding = tiktoken_with(BYTES | PAIRS)
    for text, start, end in zip(texts, offsets, offsets[1:]):
        expected = encoding.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(ids[start:end], expected), f"{text[:20]!r}... to ...{text[-20:]!r}"


def test_ids_are_tiktokens_on_any_unicode():
    tokenizer, encoding = rustbpe.Tokenizer.from_ranks(BYTES | PAIRS), tiktoken_with(BYTES | PAIRS)

    @settings(max_examples=600, deadline=None)
    @given(text=texts_of(st.characters(codec="utf-8")))
    def agree(text):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)

    agree()


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(small_tokens, max_size=12, unique=True),
    rng=st.randoms(use_true_random=False),
    texts=st.lists(st.text("ab ", max_size=15) | st.text("ab", min_size=60) | texts_of(assigned), max_size=5),
)
def test_ids_of_any_ranks_are_those_of_the_reference(tokens, rng, texts):
    """Tokens that no merges reach (a whole word may still be one), bytes with other ids than 0 to 255."""
    ids = rng.sample(range(256 + len(tokens)), 256 + len(tokens))
    ranks = dict(zip([*BYTES, *tokens], ids))
    tokenizer, encoding = rustbpe.Tokenizer.from_ranks(ranks), tiktoken_with(ranks)
    assert tokenizer.get_mergeable_ranks() == sorted(ranks.items(), key=lambda item: item[1])
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encode_slowly(ranks, text) == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_uint16_if_the_vocabulary_allows(size, dtype):
    tokens = [*BYTES, *(b"%x" % i for i in range(2**20, 2**20 + size - 256))]
    tokenizer = rustbpe.Tokenizer.from_ranks({token: id for id, token in enumerate(tokens)})
    for text in ("abc", ""):  # by the vocabulary, so that all shards of a tokenizer have one type
        assert tokenizer.encode_to_numpy([text])[0].dtype == dtype
    assert tokenizer.decode([size - 1, 99]) == tokens[-1].decode() + "c"


def test_enormous_words_and_runs_are_trained_on_and_encoded():
    """They must not crash, nor take quadratic time."""
    rng, size = random.Random(0), 300_000
    texts = [unit * size for unit in ("a", " ", "🙂", "=")]
    texts += [unit * (size // 5) for unit in ("A", "\n", "\t \n", "'", "'s", "7", "\u0301", "中", "aA", "/\n")]
    texts.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size)))
    texts.append(rng.randbytes(size).decode("utf-8", "replace"))
    texts.append(" " * 1_000_001 + "x")  # where tiktoken panics
    trained(["=" * size], 5000)  # tokens of up to 300,000 bytes
    tokenizer = trained(texts)
    ids, offsets = tokenizer.encode_to_numpy(texts)
    for text, start, end in zip(texts, offsets, offsets[1:]):
        assert tokenizer.decode(ids[start:end].tolist()) == text, text[:20]


# -----------------------------------------------------------------------------
# Bad input


def refuses(call, *args, **options):
    with pytest.raises((ValueError, TypeError)) as error:
        call(*args, **options)
    assert len(str(error.value)) > 8, f"not a helpful message: {error.value!r}"


def test_bad_input_is_refused_and_changes_nothing():
    def fails():
        yield "some text"
        raise OSError("the shard is damaged")

    tokenizer = trained(["the theme of the thesis", ""])
    before = tokens_of(tokenizer)
    for wrong in ("one text", ["fine", b"ab"], 5, None, ["a lone \ud800"]):
        refuses(tokenizer.encode_to_numpy, wrong)
        refuses(tokenizer.train_from_iterator, wrong, 300)
    for vocab_size in (255, 2**21, "300", None, 2.5):
        refuses(tokenizer.train_from_iterator, ["text"], vocab_size)
    refuses(tokenizer.encode_to_numpy, ["text"], threads=0)
    with pytest.raises(OSError, match="damaged"):
        tokenizer.train_from_iterator(fails(), 300)
    assert tokens_of(tokenizer) == before


def test_patterns_and_ranks_that_are_not_ours_are_refused():
    assert rustbpe.PATTERN == SPLIT_PATTERN
    for pattern in (SPLIT_PATTERN.replace("{1,2}", "{1,3}"), None):
        refuses(trained, ["text"], pattern=pattern)
        refuses(rustbpe.Tokenizer.from_ranks, BYTES, pattern)
    without = {token if token != b"x" else b"xx": id for token, id in BYTES.items()}
    for ranks in ({}, without, *(BYTES | {b"ab": id} for id in (5, 257, -1, "256")), BYTES | {b"": 256}, BYTES | {"ab": 256}, None):
        refuses(rustbpe.Tokenizer.from_ranks, ranks)


def test_cargo_test(tmp_path):
    cargo, crate = shutil.which("cargo"), ROOT / "rustbpe"
    if not cargo:
        pytest.skip("needs cargo")
    target = crate / "target" if (crate / "target").exists() else tmp_path
    env = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    done = subprocess.run([cargo, "test", "--release", "--offline"], cwd=crate, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
