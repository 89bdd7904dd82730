"""Our rustbpe over many texts at once: arrow, threads, and all that is refused without a crash or a change."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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


def test_all_inputs_and_any_number_of_threads_give_the_same_rows():
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
def test_slices_with_nulls(texts, begin, length, threads):
    """A null counts as an empty text, wherever the slice begins in the bits that mark it."""
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


def test_bytes_that_lie_under_a_null_are_no_text():
    array = strings_of([0, 2, 6, 7], b"ab\xff\xfe\xfd\xfcc", valid=[1, 0, 1])
    assert rows(rustbpe.Tokenizer.from_ranks(BYTES, PATTERN), array) == [[97, 98], [], [99]]
    assert state(trained([array])) == state(trained(["ab", "c"]))


def test_ids_take_two_bytes_where_that_is_enough():
    for highest, dtype in ((65535, np.uint16), (65536, np.uint32), (2**30 - 1, np.uint32)):
        tokenizer = rustbpe.Tokenizer.from_ranks(BYTES | {b"ab": highest}, PATTERN)
        for texts in (["ab", "c"], ["c"], []):  # the vocabulary decides, so that shards of one tokenizer are alike
            assert tokenizer.encode_to_numpy(texts)[0].dtype == dtype
        assert rows(tokenizer, ["ab", "c"]) == [[highest], [99]]
        assert tokenizer.decode([highest, 99]) == "abc"


def test_one_tokenizer_in_many_threads():
    tokenizer, texts = trained(TEXTS), TEXTS * 20
    expected = [tokenizer.encode(text) for text in texts]

    def work(i):
        return [tokenizer.encode(text) for text in texts] if i % 2 else rows(tokenizer, texts, threads=2)

    with ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(work, range(40)))
        pool.map(tokenizer.decode, expected)


@pytest.mark.parametrize("arrow", [False, True])
def test_other_python_threads_run_meanwhile(arrow):
    """Python takes the GIL from nobody for ten seconds, so the other thread gets on only if encoding gives it away."""
    tokenizer, texts = trained(TEXTS), [f"some words and the number {i}\n" * 20 for i in range(20_000)]
    texts = pa.array(texts) if arrow else texts
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        for _ in range(10):  # a busy machine may let the other thread wait for the length of one call
            started, ended, got_on = threading.Event(), threading.Event(), []
            other = threading.Thread(target=lambda: (started.wait(), got_on.append(not ended.is_set())))
            other.start()
            started.set()
            tokenizer.encode_to_numpy(texts, threads=1)
            ended.set()
            other.join()
            if got_on == [True]:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("no other Python thread ran while texts were encoded")


# -----------------------------------------------------------------------------
# Errors: each a ValueError or TypeError that says what is wrong, and nothing has changed

REFUSED = (ValueError, TypeError, OverflowError)


def refuses(call, *args, **options):
    with pytest.raises(REFUSED) as error:
        call(*args, **options)
    assert len(str(error.value).strip("\0 ")) > 8, f"says too little: {error.value!r}"


NO_TEXTS = {
    "integers": pa.array([1, 2]),
    "binary": pa.array([b"ab"]),
    "lists": pa.array([["ab"]]),
    "chunks of integers": pa.chunked_array([[1], [2]]),
    "a table": pa.table({"text": ["ab"]}),
    "no UTF-8": strings_of([0, 1, 2], b"a\xff"),
    "no UTF-8, large": strings_of([0, 2], b"\xed\xa0", kind=pa.large_string()),
    "a character cut in two": strings_of([0, 1, 2], "é".encode()),
    "no UTF-8 in the second chunk": pa.chunked_array([["ab"], strings_of([0, 1], b"\x80")]),
    "half a surrogate pair": ["fine", "a\ud800b"],
    "bytes": ["fine", b"ab"],
    "None": ["fine", None],
    "lists of texts": [["ab"]],
    "a number": 5,
    "nothing": None,
}


@pytest.mark.parametrize("wrong", NO_TEXTS.values(), ids=NO_TEXTS)
def test_what_is_no_text_is_refused(wrong):
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
    refuses(tokenizer.encode_to_numpy, "a text that is no list")
    refuses(rustbpe.word_ends, "a\ud800b", PATTERN)
    refuses(rustbpe.word_ends, b"ab", PATTERN)
    assert state(tokenizer) == before


@pytest.mark.parametrize("pattern", ["(", r"\p{Nonsense}", "[a", "(?<name"])
def test_an_invalid_pattern_is_refused(pattern):
    refuses(trained, TEXTS, pattern=pattern)
    refuses(rustbpe.Tokenizer.from_ranks, BYTES, pattern)
    refuses(lambda: counted(TEXTS, pattern))


def test_ranks_that_are_no_vocabulary_are_refused():
    without = {token: id for token, id in BYTES.items() if token != b"x"}
    for ranks in ({}, without, BYTES | {b"ab": 5}, BYTES | {b"ab": 2**30}, BYTES | {b"ab": -1}, BYTES | {b"": 256}):
        refuses(rustbpe.Tokenizer.from_ranks, ranks, PATTERN)
    for ranks in (BYTES | {"ab": 256}, BYTES | {b"ab": "256"}, [*BYTES.items()], None):
        refuses(rustbpe.Tokenizer.from_ranks, ranks, PATTERN)


def test_ids_that_give_no_text_are_refused():
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


@pytest.mark.parametrize("buffer_size", [1, 8192])
def test_an_exception_of_the_iterator_comes_through(buffer_size):
    def broken(last):
        yield "some text"
        yield pa.array(["more"])
        if last is None:
            raise Stop("the shard is damaged")
        yield last

    tokenizer = trained(TEXTS)
    before = state(tokenizer)
    with pytest.raises(Stop, match="damaged"):
        tokenizer.train_from_iterator(broken(None), 300, buffer_size=buffer_size)
    with pytest.raises(TypeError):
        tokenizer.train_from_iterator(broken(5), 300, buffer_size=buffer_size)
    assert state(tokenizer) == before


def test_an_exception_of_the_progress_callback_comes_through():
    def stop(done, wanted):
        raise Stop("enough")

    tokenizer, counts = trained(TEXTS), counted(TEXTS)
    before = state(tokenizer)
    with pytest.raises(Stop, match="enough"):
        tokenizer.train_from_iterator(TEXTS, 300, progress=stop)
    with pytest.raises(Stop, match="enough"):
        tokenizer.train_from_counts(counts, 300, progress=stop)
    assert state(tokenizer) == before == state(trained_from_counts(counts))
