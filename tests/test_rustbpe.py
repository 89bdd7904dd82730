"""Our rustbpe: training and bad input. test_rustbpe_split.py tests words and ids, test_tokenizer.py threads."""

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPLIT_PATTERN

if not hasattr(rustbpe, "PATTERN"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
BYTES = {bytes([byte]): byte for byte in range(256)}
TEXTS = ["the theme of the thesis", "", "한국어 aaaaaaa", "it's 12 or 345\n\n  fine 🙂" * 3, "the end"]

corpora = st.one_of(
    st.lists(st.text("ab ", max_size=20), max_size=6),
    st.lists(st.sampled_from(["aaaa", "aa", "aaaaaaab", "ab" * 9, "abc", " ", "", "a" * 33, "baaab"]), max_size=12),
    st.lists(st.text("aé한🙂\n", max_size=15), max_size=6),
    st.lists(st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=15), max_size=5),
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
    ranks = tokenizer.get_mergeable_ranks()
    assert [id for _, id in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


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


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_uint16_if_the_vocabulary_allows(size, dtype):
    tokens = [*BYTES, *(b"%x" % i for i in range(2**20, 2**20 + size - 256))]
    tokenizer = rustbpe.Tokenizer.from_ranks({token: id for id, token in enumerate(tokens)})
    for text in ("abc", ""):  # by the vocabulary, so that all shards of a tokenizer have one type
        assert tokenizer.encode_to_numpy([text])[0].dtype == dtype
    assert tokenizer.decode([size - 1, 99]) == tokens[-1].decode() + "c"


def refuses(call, *args, **options):
    with pytest.raises((ValueError, TypeError)) as error:
        call(*args, **options)
    assert len(str(error.value)) > 8, f"not a helpful message: {error.value!r}"


def test_bad_input_is_refused_and_changes_nothing():
    def fails():
        yield "some text"
        raise OSError("the shard is damaged")

    tokenizer = trained(TEXTS)
    before = tokens_of(tokenizer)
    for wrong in ("one text", ["fine", b"ab"], ["fine", None], [["ab"]], 5, None):
        refuses(tokenizer.encode_to_numpy, wrong)
        refuses(tokenizer.train_from_iterator, wrong, 300)
    for vocab_size in (255, 2**21, -1, "300", None, 2.5):
        refuses(tokenizer.train_from_iterator, TEXTS, vocab_size)
    for threads in (0, -1, 1.5, "2"):
        refuses(tokenizer.train_from_iterator, TEXTS, 300, threads=threads)
        refuses(tokenizer.encode_to_numpy, TEXTS, threads=threads)
    with pytest.raises(UnicodeEncodeError, match="surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(OSError, match="damaged"):
        tokenizer.train_from_iterator(fails(), 300)
    assert tokens_of(tokenizer) == before


def test_patterns_other_than_nanochats_are_refused():
    assert rustbpe.PATTERN == SPLIT_PATTERN
    for pattern in (SPLIT_PATTERN.replace("{1,2}", "{1,3}"), "(", "", None):
        with pytest.raises(ValueError, match="PATTERN"):
            trained(TEXTS, pattern=pattern)
        with pytest.raises(ValueError, match="PATTERN"):
            rustbpe.Tokenizer.from_ranks(BYTES, pattern)


def test_ranks_that_are_not_a_vocabulary_are_refused():
    without = {token if token != b"x" else b"xx": id for token, id in BYTES.items()}
    wrong = [{}, without, BYTES | {b"ab": 5}, BYTES | {b"ab": 257}, BYTES | {b"ab": -1}, BYTES | {b"": 256}]
    for ranks in (*wrong, BYTES | {"ab": 256}, BYTES | {b"ab": "256"}, [*BYTES.items()], None):
        refuses(rustbpe.Tokenizer.from_ranks, ranks)


def test_cargo_test(tmp_path):
    cargo, crate = shutil.which("cargo"), ROOT / "rustbpe"
    if not cargo:
        pytest.skip("needs cargo")
    target = crate / "target" if (crate / "target").exists() else tmp_path
    env = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    done = subprocess.run([cargo, "test", "--release", "--offline"], cwd=crate, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
