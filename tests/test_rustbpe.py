"""Our rustbpe: training and word counts. test_rustbpe_split.py tests words and ids, test_rustbpe_bulk.py bulk encoding and errors."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

if not hasattr(rustbpe, "Counts"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
OTHER = r"\S+|\s+"  # not one of those with a scanner of their own
BYTES = {bytes([byte]): byte for byte in range(256)}
TEXTS = ["the theme of the thesis", "", "한국어 aaaaaaa", "it's 12 or 345\n\n  fine 🙂" * 3, "the end"]

corpora = st.one_of(
    st.lists(st.text("ab ", max_size=20), max_size=6),
    st.lists(st.sampled_from(["aaaa", "aa", "aaaaaaab", "ab" * 9, "abc", " ", "", "a" * 33, "baaab"]), max_size=12),
    st.lists(st.text("aé한🙂\n", max_size=15), max_size=6),
    st.lists(st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=15), max_size=5),
)
threads = st.sampled_from([1, 2, 3])


def train_slowly(texts, vocab_size, pattern, counts=None):
    """The reference implementation of byte-pair encoding: tokens in the order in which they are learned.

    Each merge counts all pairs again and takes the most frequent; ties go to the lowest first id, then the lowest second.
    Ends early when every word is one token. `counts` gives the words' counts where there are too many to write out.

        train_slowly(["aaab aab"], 258, OTHER)[256:] == [b"aa", b"ab"]
    """
    counts = counts or Counter(match[0] for text in texts for match in regex.finditer(pattern, text))
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


def trained(items, vocab_size=300, pattern=PATTERN, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(items), vocab_size, pattern=pattern, **options)
    return tokenizer


def tokens_of(tokenizer):
    ranks = tokenizer.get_mergeable_ranks()
    assert [id for _, id in ranks] == list(range(tokenizer.vocab_size))
    assert all(type(token) is bytes for token, _ in ranks)
    return [token for token, _ in ranks]


def state(tokenizer):
    return tokenizer.get_pattern(), tokens_of(tokenizer), tokenizer.encode("the thesis")


def counted(texts, pattern=PATTERN, **options):
    counts = rustbpe.Counts(pattern)
    counts.add(texts, **options)
    return counts


def trained_from_counts(counts, vocab_size=300):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_counts(counts, vocab_size)
    return tokenizer


def as_arrow(texts):
    """The same texts as every kind of arrow array: with 32- and 64-bit offsets, sliced, in chunks."""
    padded = pa.array(["left out", None, *texts, "left out"], pa.string())
    half = len(texts) // 2
    return {
        "string": pa.array(texts, pa.string()),
        "large_string": pa.array(texts, pa.large_string()),
        "slice": padded.slice(2, len(texts)),
        "large slice": padded.cast(pa.large_string()).slice(2, len(texts)),
        "chunks": pa.chunked_array([texts[:half], [], texts[half:]], pa.string()),
        "slice of chunks": pa.chunked_array([["left out"], texts, ["more"]], pa.large_string()).slice(1, len(texts)),
    }


# -----------------------------------------------------------------------------
# Training


def test_an_untrained_tokenizer_is_256_bytes():
    assert rustbpe.Tokenizer().get_mergeable_ranks() == [*BYTES.items()]
    assert rustbpe.Tokenizer().vocab_size == 256


@settings(max_examples=500, deadline=None)
@given(corpora, st.integers(256, 290), st.sampled_from([PATTERN, OTHER]), threads, st.integers(1, 4), st.booleans())
def test_training_equals_brute_force(texts, vocab_size, pattern, threads, buffer_size, arrow):
    items = [pa.array(texts, pa.string())] if arrow else texts
    tokenizer = trained(items, vocab_size, pattern, threads=threads, buffer_size=buffer_size)
    assert tokens_of(tokenizer) == train_slowly(texts, vocab_size, pattern)


def test_training_on_documents_equals_brute_force():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "nanochat" / "engine.py")]
    assert tokens_of(trained(texts, 400)) == train_slowly(texts, 400, PATTERN)


def test_ties_go_to_the_lower_ids():
    assert tokens_of(trained(["dc ba dc ba"], 258, OTHER))[256:] == [b"ba", b"dc"]
    assert tokens_of(trained(["ac ab"], 258, OTHER))[256:] == [b"ab", b"ac"]


def test_training_ends_when_no_pair_is_left():
    assert tokens_of(trained(["abcd"], 5000, OTHER))[256:] == [b"ab", b"cd", b"abcd"]
    for nothing in ([], [""], ["a", "b"], [pa.array([], pa.string())], [pa.nulls(2, pa.string())]):
        assert trained(nothing, 5000).vocab_size == 256


def test_order_buffer_size_and_type_of_the_texts_do_not_matter():
    texts = TEXTS * 20
    expected = tokens_of(trained(texts))
    assert tokens_of(trained(texts[::-1], buffer_size=7, threads=2)) == expected
    for array in as_arrow(texts).values():
        assert tokens_of(trained([array], threads=3)) == expected
        assert tokens_of(trained([array[:50], *texts[50:60], array[60:]], buffer_size=3)) == expected


def test_training_again_replaces_what_was_learned():
    tokenizer = trained(["zzzz zzz"], 260)
    tokenizer.train_from_iterator(iter(TEXTS), 300, pattern=OTHER)
    assert state(tokenizer) == state(trained(TEXTS, 300, OTHER))


def test_progress_is_reported():
    texts = ["".join(map(chr, letters)) for letters in np.random.default_rng(0).integers(97, 123, (5000, 8))]
    seen = []
    trained(texts, 3000, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and {total for _, total in seen} == {3000 - 256} and seen[-1][0] <= 3000 - 256


# -----------------------------------------------------------------------------
# Counts


@settings(max_examples=150, deadline=None)
@given(corpora, corpora, st.sampled_from([PATTERN, OTHER]), threads)
def test_counts_saved_loaded_and_merged_equal_one_training(tmp_path_factory, first, second, pattern, threads):
    path = tmp_path_factory.getbasetemp() / "counts"
    counts, rest = counted(first, pattern, threads=threads), counted(pa.array(second, pa.string()), pattern)
    rest.save(path)
    counts.merge(rustbpe.Counts.load(path))
    assert len(counts) == len({match[0] for text in first + second for match in regex.finditer(pattern, text)})
    tokenizer = trained_from_counts(counts, 280)
    assert tokens_of(tokenizer) == train_slowly(first + second, 280, pattern)
    assert tokenizer.get_pattern() == pattern
    assert len(rest) == len(rustbpe.Counts.load(str(path))), "the argument of merge changed"


def test_counts_above_32_bits_are_exact(tmp_path):
    counts, words = counted(["abab"], OTHER), Counter(["abab"])
    for doubling in range(40):
        counts.save(tmp_path / "counts")
        counts.merge(rustbpe.Counts.load(tmp_path / "counts"))
        words += words
        if doubling in (0, 31):  # in 32 bits, 2**40 would be 0 and 2**39 + 2**8 would be 256
            counts.add(["bcbc", "cd cd"])
            words += Counter(["bcbc", "cd", "cd", " "])
    assert words["abab"] == 2**40 and words["bcbc"] == 2**39 + 2**8
    assert tokens_of(trained_from_counts(counts, 264)) == train_slowly(None, 264, OTHER, words)


def test_counts_of_another_pattern_are_refused():
    counts = counted(TEXTS)
    with pytest.raises(ValueError, match="pattern"):
        counts.merge(counted(TEXTS, OTHER))
    assert state(trained_from_counts(counts)) == state(trained(TEXTS))


def test_damaged_counts_are_refused(tmp_path):
    """Any bit may flip: the file is refused, or, where a bit has no meaning, read as it was saved."""
    path, ends = tmp_path / "counts.npz", np.arange(1, 6, dtype=np.uint64)
    counted(TEXTS).save(path)
    whole = path.read_bytes()
    for damaged in [*(whole[:size] for size in range(0, len(whole), 11)), whole[:-1], b"\xff" * 100, bytes(100)]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            rustbpe.Counts.load(path)
    for i in [*range(0, len(whole), 7), *range(max(0, len(whole) - 30), len(whole))]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        try:
            rustbpe.Counts.load(path).save(path)
        except ValueError:
            continue
        assert path.read_bytes() == whole, f"byte {i} was changed and something else was read"

    good = {"pattern": np.frombuffer(OTHER.encode(), np.uint8), "bytes": np.full(5, 97, np.uint8), "ends": ends, "counts": ends}
    for name, wrong in [("counts", np.zeros((5, 0), np.uint64)), ("bytes", np.zeros((10**9, 0), np.uint8)),
                        ("counts", ends[:4]), ("ends", ends * 1000), ("bytes", np.full(5, 255, np.uint8))]:  # fmt: skip
        np.savez(path, **{**good, name: wrong})
        with pytest.raises(ValueError, match="damaged"):
            rustbpe.Counts.load(path)


def test_adding_from_several_threads_loses_nothing():
    words = [f"{i:x}" for i in range(20_000)]
    counts = counted(words, OTHER)
    with ThreadPoolExecutor(4) as pool:
        adding = [pool.submit(counts.add, ["hello world" * 50] * 20, 1) for _ in range(200)]
        assert all(len(counts) >= len(words) for _ in range(50))
        assert all(task.result() is None for task in adding)
    data, ends, numbers = counts._words()
    assert len(ends) == len(counts) and numbers.sum() == len(words) + 200 * 20 * 101


def test_a_tokenizer_can_be_copied_and_counts_refuse():
    tokenizer = trained(TEXTS)
    assert state(pickle.loads(pickle.dumps(tokenizer))) == state(copy.deepcopy(tokenizer)) == state(tokenizer)
    for refuse in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="save"):
            refuse(counted(TEXTS))


def test_a_process_exits_cleanly_while_a_thread_encodes():
    program = "import rustbpe, threading, time\nt = rustbpe.Tokenizer()\nt.train_from_iterator(['some words'], 260)\n"
    program += "def work():\n    while True: t.encode_to_numpy(['some words and more ' * 50] * 500, 1)\n"
    program += "threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.2)"
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


# -----------------------------------------------------------------------------
# Rust


def test_cargo_test(tmp_path):
    crate = ROOT / "rustbpe"
    cargo = shutil.which("cargo")
    if not cargo or not (crate / "Cargo.toml").exists():
        pytest.skip("needs cargo and the source of rustbpe")
    target = crate / "target" if (crate / "target").exists() else tmp_path
    env = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    command = [cargo, "test", "--release", "--offline"]
    done = subprocess.run(command, cwd=crate, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
