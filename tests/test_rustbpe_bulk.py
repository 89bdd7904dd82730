"""Our rustbpe: encoding many texts at once (arrow, threads), and bad input, which is refused without a crash or a change."""

import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rustbpe import BYTES, PATTERN, TEXTS, as_arrow, counted, state, threads, trained, trained_from_counts

# -----------------------------------------------------------------------------
# Bulk encoding, arrow, threads


def rows(tokenizer, texts, **options):
    ids, offsets = tokenizer.encode_to_numpy(texts, **options)
    assert ids.ndim == 1 and offsets.dtype == np.int64 and offsets.shape == (len(texts) + 1,)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and (np.diff(offsets) >= 0).all()
    return [ids[begin:end].tolist() for begin, end in zip(offsets, offsets[1:])]


def test_rows_do_not_depend_on_the_type_of_texts_or_the_threads():
    tokenizer = trained(TEXTS)
    texts = [text * (i % 30) + str(i) for i, text in enumerate(TEXTS * 60)]
    expected = [tokenizer.encode(text) for text in texts]
    for number in (None, 1, 2, 3, 4):
        for items in (texts, *as_arrow(texts).values()):
            assert rows(tokenizer, items, threads=number) == expected
    assert rows(tokenizer, ["", "", "the", ""]) == [[], [], tokenizer.encode("the"), []]
    for nothing in ([], pa.array([], pa.string()), pa.chunked_array([], pa.large_string())):
        assert rows(tokenizer, nothing) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | st.text(max_size=9), max_size=20), st.integers(0, 9), st.integers(0, 20), threads)
def test_a_null_in_a_slice_is_an_empty_text(texts, begin, length, threads):
    """Wherever the slice begins in the validity bitmap."""
    tokenizer = rustbpe.Tokenizer.from_ranks(BYTES, PATTERN)
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(texts, kind).slice(begin, length)
        expected = [[*(text or "").encode()] for text in texts[begin : begin + length]]
        assert rows(tokenizer, array, threads=threads) == expected
        assert rows(tokenizer, pa.chunked_array([array, array]), threads=threads) == expected * 2


def strings_of(offsets, data, valid=None, kind=pa.string()):
    width = np.int32 if kind == pa.string() else np.int64
    bits = valid and pa.py_buffer(bytes([sum(bit << i for i, bit in enumerate(valid))]))
    buffers = [bits, pa.py_buffer(np.array(offsets, width).tobytes()), pa.py_buffer(data)]
    return pa.Array.from_buffers(kind, len(offsets) - 1, buffers)


def test_bytes_under_a_null_are_ignored():
    array = strings_of([0, 2, 6, 7], b"ab\xff\xfe\xfd\xfcc", valid=[1, 0, 1])
    assert rows(rustbpe.Tokenizer.from_ranks(BYTES, PATTERN), array) == [[97, 98], [], [99]]
    assert state(trained([array])) == state(trained(["ab", "c"]))


def test_ids_are_uint16_where_the_vocabulary_allows():
    for highest, dtype in ((65535, np.uint16), (65536, np.uint32), (2**30 - 1, np.uint32)):
        tokenizer = rustbpe.Tokenizer.from_ranks(BYTES | {b"ab": highest}, PATTERN)
        for texts in (["ab", "c"], ["c"], []):  # by the vocabulary, so that all shards of a tokenizer are alike
            assert tokenizer.encode_to_numpy(texts)[0].dtype == dtype
        assert rows(tokenizer, ["ab", "c"]) == [[highest], [99]]
        assert tokenizer.decode([highest, 99]) == "abc"


def test_other_python_threads_run_while_texts_are_encoded():
    """With a switch interval of ten seconds, the other thread runs in time only if encoding releases the GIL."""
    tokenizer, texts = trained(TEXTS), [f"some words and the number {i}\n" * 20 for i in range(20_000)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        for _ in range(10):  # on a busy machine the other thread may be late once
            started, ended, in_time = threading.Event(), threading.Event(), []
            other = threading.Thread(target=lambda: (started.wait(), in_time.append(not ended.is_set())))
            other.start()
            started.set()
            tokenizer.encode_to_numpy(texts, threads=1)
            ended.set()
            other.join()
            if in_time == [True]:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("no other Python thread ran while texts were encoded")


# -----------------------------------------------------------------------------
# Bad input: an error that says what is wrong, and nothing has changed

REFUSED = (ValueError, TypeError, OverflowError)


def refuses(call, *args, **options):
    with pytest.raises(REFUSED) as error:
        call(*args, **options)
    assert len(str(error.value).strip("\0 ")) > 8, f"not a helpful message: {error.value!r}"


NOT_TEXTS = {
    "integers": pa.array([1, 2]),
    "binary": pa.array([b"ab"]),
    "lists": pa.array([["ab"]]),
    "chunks of integers": pa.chunked_array([[1], [2]]),
    "a table": pa.table({"text": ["ab"]}),
    "invalid UTF-8": strings_of([0, 1, 2], b"a\xff"),
    "invalid UTF-8, large": strings_of([0, 2], b"\xed\xa0", kind=pa.large_string()),
    "a character cut in two": strings_of([0, 1, 2], "é".encode()),
    "invalid UTF-8 in the second chunk": pa.chunked_array([["ab"], strings_of([0, 1], b"\x80")]),
    "a lone surrogate": ["fine", "a\ud800b"],
    "bytes": ["fine", b"ab"],
    "None": ["fine", None],
    "lists of texts": [["ab"]],
    "a number": 5,
    "no texts": None,
}


@pytest.mark.parametrize("wrong", NOT_TEXTS.values(), ids=NOT_TEXTS)
def test_values_that_are_not_texts_are_refused(wrong):
    tokenizer, counts = trained(TEXTS), counted(TEXTS)
    before, words = state(tokenizer), len(counts)
    for number in (1, 2):
        refuses(tokenizer.encode_to_numpy, wrong, threads=number)
        refuses(counts.add, wrong, threads=number)
        items = wrong if isinstance(wrong, (list, int, type(None))) else [wrong]
        refuses(tokenizer.train_from_iterator, items, 300, threads=number)
    assert state(tokenizer) == before
    assert len(counts) == words and state(trained_from_counts(counts)) == before


def test_wrong_arguments_are_refused():
    tokenizer = trained(TEXTS)
    before = state(tokenizer)
    for vocab_size in (255, 0, -1, "300", None, 2.5):
        refuses(tokenizer.train_from_iterator, TEXTS, vocab_size)
        refuses(tokenizer.train_from_counts, counted(TEXTS), vocab_size)
    refuses(tokenizer.train_from_counts, TEXTS, 300)
    refuses(tokenizer.train_from_iterator, TEXTS, 300, pattern=5)
    for call in (tokenizer.encode, lambda text: tokenizer.batch_encode(["fine", text])):
        for wrong in (5, None, b"ab", ["ab"]):
            refuses(call, wrong)
        with pytest.raises(UnicodeEncodeError, match="surrogate"):
            call("a\ud800b")
    with pytest.raises(UnicodeEncodeError, match="surrogate"):
        tokenizer.encode_to_numpy(["a\ud800b"])
    for single in ("one text", pa.array(["one text"])):
        with pytest.raises(TypeError, match="list"):
            tokenizer.train_from_iterator(single, 300)
    refuses(tokenizer.encode_to_numpy, "one text")
    refuses(rustbpe.word_ends, "a\ud800b", PATTERN)
    refuses(rustbpe.word_ends, b"ab", PATTERN)
    assert state(tokenizer) == before


@pytest.mark.parametrize("pattern", ["(", r"\p{Nonsense}", "[a", "(?<name"])
def test_an_invalid_pattern_is_refused(pattern):
    refuses(trained, TEXTS, pattern=pattern)
    refuses(rustbpe.Tokenizer.from_ranks, BYTES, pattern)
    refuses(lambda: counted(TEXTS, pattern))


def test_ranks_that_are_not_a_vocabulary_are_refused():
    without = {token: id for token, id in BYTES.items() if token != b"x"}
    for ranks in ({}, without, BYTES | {b"ab": 5}, BYTES | {b"ab": 2**30}, BYTES | {b"ab": -1}, BYTES | {b"": 256}):
        refuses(rustbpe.Tokenizer.from_ranks, ranks, PATTERN)
    for ranks in (BYTES | {"ab": 256}, BYTES | {b"ab": "256"}, [*BYTES.items()], None):
        refuses(rustbpe.Tokenizer.from_ranks, ranks, PATTERN)


def test_ids_that_cannot_be_decoded_are_refused():
    tokenizer = rustbpe.Tokenizer.from_ranks(BYTES | {b"ab": 1000}, PATTERN)
    for ids in ([97, 256], [999], [1001], [2**32 - 1], [-1], [2**70], ["a"], [None], 97, None):
        refuses(tokenizer.decode, ids)
    with pytest.raises(ValueError, match="256"):
        tokenizer.decode([97, 256])
    for data in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.decode([*data])


class Stop(Exception):
    pass


def test_exceptions_of_the_iterator_and_of_progress_propagate():
    def broken(last):
        yield "some text"
        yield pa.array(["more"])
        if last is None:
            raise Stop("the shard is damaged")
        yield last

    def stop(done, total):
        raise Stop("enough")

    tokenizer, counts = trained(TEXTS), counted(TEXTS)
    before = state(tokenizer)
    for buffer_size in (1, 8192):
        with pytest.raises(Stop, match="damaged"):
            tokenizer.train_from_iterator(broken(None), 300, buffer_size=buffer_size)
        with pytest.raises(TypeError):
            tokenizer.train_from_iterator(broken(5), 300, buffer_size=buffer_size)
    for call, texts in ((tokenizer.train_from_iterator, TEXTS), (tokenizer.train_from_counts, counts)):
        with pytest.raises(Stop, match="enough"):
            call(texts, 300, progress=stop)
    assert state(tokenizer) == before == state(trained_from_counts(counts))
