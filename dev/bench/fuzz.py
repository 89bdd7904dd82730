"""Can rustbpe be broken? Random input through every entry point, in a process that another one watches.

    python -m dev.bench.fuzz                       # ten minutes, then 1,000 cycles that must not grow
    python -m dev.bench.fuzz --seed 5 --case 1234  # one case again, with its whole traceback

The one idea to know: a call either gives the right answer or raises an error that a caller can expect (ALLOWED, or
what its own callback raised). Right is what tiktoken says, or a slow clear twin that is written here. All else is a
failure: a wrong answer, another exception, a crash, silence for a minute. Case N of seed S is always the same input.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import multiprocessing
import random
import tempfile
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, product
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import regex
import rustbpe
import tiktoken
from tiktoken_ext import openai_public

from nanochat.tokenizer import SPLIT_PATTERN

ALLOWED = (ValueError, TypeError, OSError)  # UnicodeError is a ValueError
GROWTH = 1.0  # MiB that memory may grow over the last 800 of 1,000 cycles

KNOWN = [  # patterns with a scanner of their own: GPT-2's in two spellings, Llama 3's, and so on
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]
with mock.patch.object(openai_public, "load_tiktoken_bpe"):  # the patterns only: nothing is fetched
    openai = openai_public.r50k_base(), openai_public.cl100k_base(), openai_public.o200k_base()
KNOWN += [SPLIT_PATTERN, rustbpe.GPT4_PATTERN, *(encoding["pat_str"] for encoding in openai)]

FRAGMENTS = "'s|'S|'Ll|'re|'vE|'\u017f|'t\u0301|don't|\r\n|\n\n| \n|!\n|?/\r\n/|  |\u01c5|\u02b0a|\u00aa|e\u0301\u0323"
FRAGMENTS += "|\u05e9\u05dc|\u202e\u0645|\u2167|\U0001d7d8|\u4f60|\ud55c\u1112|\U0001f468\u200d\U0001f469|\u2764\ufe0f"
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e"
ALPHABETS = ["abcdeETAOIN ", "abe ", SPACES, "0123456789", "!?.,'/\\()[]{}<|>_\0\ufffd", FRAGMENTS.split("|")]
ATOMS = r". \s \S \w+ \d{1,3} \p{L}+ \p{Lu} [^\s\p{L}]+ a b* [a-z]+? \b ^ $ \p{M}*+ (?=a) (?!a) (?i:e) \X (?>a+) (a|e)?"
WRONG = r"( ) [ * \p{Nonsense} (?<n>a)(?<n \ a{99999999999} [z-a] \1 (?(1)a|b)"


def random_text(rng: random.Random, size: int, settled: bool = False) -> str:
    """About `size` characters of all kinds; settled: only those whose class is the same in all versions of Unicode."""
    text = ""
    while len(text) < size:
        first = rng.randrange(rng.choice([0x3000, 0x10FFE0]))
        part = "".join(rng.choices(rng.choice([*ALPHABETS, [chr(first + i) for i in range(32)]]), k=rng.randint(1, 8)))
        if rng.random() < 0.1:  # a long run
            part = part[: rng.randint(1, 2)] * min(size, rng.choice([2, 40, 20_000]))
        text += part.encode(errors="ignore").decode()  # without halves of surrogate pairs
    return "".join(c for c in text if c != "\u0295" and unicodedata.category(c) != "Cn") if settled else text


def random_texts(rng: random.Random, sizes=(0, 1, 5, 30, 150), settled: bool = False) -> list[str]:
    return [random_text(rng, rng.choice(sizes), settled) for _ in range(rng.choice([0, 1, 3, 12]))]


def random_ranks(rng: random.Random) -> dict[bytes, int]:
    """All bytes and some longer tokens, also such as no merge reaches; ids in any order, with gaps or without."""
    pieces = [bytes([byte]) for byte in b"aeotT \n1'!\xc3\xe4" + random_text(rng, 20).encode()]
    for _ in range(rng.choice([0, 5, 60, 400])):
        pieces.append((rng.choice(pieces) + rng.choice(pieces))[: rng.choice([2, 3, 200])])
    tokens = sorted({*pieces, *(bytes([byte]) for byte in range(256))}, key=lambda token: (len(token), token))
    ids = rng.sample(range(rng.choice([len(tokens), len(tokens) + 50, 2**16, 2**16 + 1, 2**30])), len(tokens))
    return dict(zip(tokens, sorted(ids) if rng.random() < 0.5 else ids))


def random_pattern(rng: random.Random) -> str:
    """A known one, perhaps with a few small changes, or any; sometimes no regular expression at all."""
    if rng.random() < 0.3:
        return rng.choice(["", "|"]).join(rng.choices(ATOMS.split() * 9 + WRONG.split(), k=rng.randint(0, 5)))
    pattern = rng.choice(KNOWN)
    for i in rng.sample(range(len(pattern)), rng.choice([0, 0, 1, 2])):
        new = rng.choice(["", "()", *"'(:[sdmt]|lvre)\\p{LN}1,3?+*^$ "])
        pattern = pattern[:i] + new + pattern[i + rng.randint(0, 1) :]
    return pattern


def junk(rng: random.Random):
    """Something that hardly any argument should be."""
    numbers = [True, 0, -1, 300, 2**31, 2**64, 2**70, -(2**70), 1.5, float("nan"), 1j, np.float64(1), np.int64(-1)]
    strings = ["", "x", "\ud800", "a\0b", "a" * 5000, b"", b"x", bytearray(b"x"), memoryview(b"x"), pa.scalar("a")]
    groups = [[], [["a"]], (), ("a",), {}, {"a": 1}, {"a"}, range(3), iter(["a"]), np.arange(3), np.array(["a"])]
    arrow = [pa.array([1]), pa.array([b"a"]), pa.nulls(3), pa.table({"a": ["b"]}), pa.array(["a"]).dictionary_encode()]
    value = rng.choice([*numbers, *strings, *groups, *arrow, None, object(), object, len, mock.MagicMock()])
    return rng.choice([value, value, [value], ["a", value], {b"a": value}])


def attempt(function, *args):
    """(answer, None), or (None, error) for an error that may be."""
    try:
        return function(*args), None
    except ALLOWED as error:
        return None, error
    except Exception as error:
        raise AssertionError(f"{function.__qualname__} of {str(args)[:300]}: {error!r}") from error


def learnt(texts, pattern=None, vocab_size: int = 600, buffer_size: int = 8192) -> list[tuple[bytes, int]]:
    tokenizer = rustbpe.Tokenizer()
    if isinstance(texts, rustbpe.Counts):
        tokenizer.train_from_counts(texts, vocab_size)
    else:
        tokenizer.train_from_iterator(iter(texts), vocab_size, buffer_size, pattern)
    return tokenizer.get_mergeable_ranks()


def twin_learnt(words: list[str], vocab_size: int) -> list[tuple[bytes, int]]:
    """The most frequent pair first, of equal ones that of the lower (left id, right id)."""
    tokens, words = [bytes([byte]) for byte in range(256)], [list(word.encode()) for word in words]
    while len(tokens) < vocab_size and (pairs := Counter(pair for ids in words for pair in zip(ids, ids[1:]))):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in words:
            for i in range(len(ids)):
                if tuple(ids[i : i + 2]) == best:
                    ids[i : i + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return [(token, id) for id, token in enumerate(tokens)]


def check_rows(rng, pattern, ranks, texts: list[str], rows: list[list[int]], decoded: list[str]) -> None:
    """Every way of encoding gives these ids, and they decode to that."""
    tokenizer, of = rustbpe.Tokenizer.from_ranks(ranks, pattern), f"of {texts!r} with {pattern!r}"
    assert tokenizer.get_pattern() == pattern and dict(tokenizer.get_mergeable_ranks()) == ranks, f"ranks {ranks}"
    assert [tokenizer.encode(text) for text in texts] == tokenizer.batch_encode(texts) == rows, f"encode {of}"
    assert [tokenizer.decode(row) for row in rows] == decoded, f"there and back {of}"
    dtype = np.uint16 if max(ranks.values()) < 2**16 else np.uint32
    wanted = dtype, [id for row in rows for id in row], np.int64, [*accumulate(map(len, rows), initial=0)]
    chunked = pa.chunked_array([texts[:2], [], texts[2:]], pa.string())
    for form in (texts, pa.array(texts, pa.string()), pa.array(texts, pa.large_string()), chunked):
        ids, offsets = tokenizer.encode_to_numpy(form, rng.choice([None, 1, 2, 17]))
        assert (ids.dtype, ids.tolist(), offsets.dtype, offsets.tolist()) == wanted, f"{type(form)} {of}"


def case_known(rng):
    """Known patterns, any text: as tiktoken, and there and back."""
    pattern, ranks, texts = rng.choice(KNOWN), random_ranks(rng), random_texts(rng, (0, 1, 5, 50, 500, 500, 30_000))
    right = tiktoken.Encoding("fuzz", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    check_rows(rng, pattern, ranks, texts, [right.encode_ordinary(text) for text in texts], texts)


def case_words(rng):
    """Any pattern: words as `regex` finds them, each word's ids as tiktoken's, merges as the twin's."""
    pattern, texts, ranks = random_pattern(rng), random_texts(rng, (0, 1, 5, 40), settled=True), random_ranks(rng)
    try:
        splitter = regex.compile(pattern)
    except Exception:  # regex.error, and others
        assert attempt(rustbpe.Counts, pattern)[1] and attempt(rustbpe.Tokenizer.from_ranks, ranks, pattern)[1], pattern
        return
    words = [[match[0] for match in splitter.finditer(text) if match[0]] for text in texts]
    whole = tiktoken.Encoding("fuzz", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    rows = [[id for word in each for id in whole.encode_ordinary(word)] for each in words]
    check_rows(rng, pattern, ranks, texts, rows, ["".join(each) for each in words])
    for text, each in zip(texts, words) if pattern in KNOWN else ():
        ends = rustbpe.word_ends(text, pattern).tolist()
        assert ends == [*accumulate(len(word.encode()) for word in each)], f"{ends} of {text!r}, {pattern!r}"
    for c in set("".join(texts)):
        flags = sum(2**i for i, kind in enumerate([r"\p{L}", r"\p{N}", r"\s", r"[\r\n]"]) if regex.match(kind, c))
        assert rustbpe.character_class(ord(c)) & 15 == flags, f"character_class of {c!r} is not {flags}"
    flat, half, vocab_size = sum(words, []), pa.array(texts[:5], pa.string()), rng.choice([256, 257, 270, 500])
    counts, more, right = rustbpe.Counts(pattern), rustbpe.Counts(pattern), twin_learnt(flat, vocab_size)
    counts.add(texts[5:], rng.choice([None, 1, 5]))
    more.add(half)
    counts.merge(more)
    assert len(counts) == len(set(flat)), f"{len(counts)} different words, not {len(set(flat))}"
    for form in (texts, [half, *texts[5:7], pa.chunked_array([texts[7:]], pa.large_string())], counts):
        assert learnt(form, pattern, vocab_size, rng.choice([1, 3])) == right, f"merges of {form!r} with {pattern!r}"


def case_arrow(rng):
    """Arrays that are slices, have nulls and chunks, or hold bad UTF-8 or bad offsets."""
    pattern, kind = rng.choice([*KNOWN, r"\S+|\s+"]), rng.choice([pa.string(), pa.large_string()])
    tokenizer, texts = rustbpe.Tokenizer.from_ranks(random_ranks(rng), pattern), ["ab", None, *random_texts(rng), None]
    array, (start, end) = pa.array(texts, kind), sorted(rng.choices(range(len(texts) + 1), k=2))
    for form in (array, array[start:end], pa.chunked_array([array, array[start:end]]), pa.chunked_array([], kind)):
        plain, (ids, offsets) = [text or "" for text in form.to_pylist()], tokenizer.encode_to_numpy(form)
        rows = [ids[start:end].tolist() for start, end in zip(offsets, offsets[1:])]
        assert rows == tokenizer.batch_encode(plain), f"encode_to_numpy of {form!r}"
        assert learnt([form], pattern) == learnt(plain, pattern), f"merges of {form!r}"
    sound, dtype = pa.array(["abc \u00e9", "de", "\U0001f600f", "", "gh"], kind), "i8" if "large" in str(kind) else "i4"
    starts, data = np.frombuffer(sound.buffers()[1], dtype)[:6], sound.buffers()[2].to_pybytes()
    wild, middle = rng.choice([-1, -(2**31), 10**6, 2**31 - 1]), rng.randint(1, 4)
    for offsets, text in [
        (starts, data.replace(b"b", rng.choice([b"\x80", b"\xc3", b"\xff", b"\xed"]))),
        (np.where(np.arange(6) == middle, wild, starts), data),
        (np.where(np.arange(6) == 1, 5, starts), data),  # inside a character
        (np.where(np.arange(6) == 5, len(data) + rng.randint(1, 99), starts), data),
        (starts, data[:8]),
        (starts[:3], data),  # fewer than there are strings
    ]:
        bad, _ = attempt(pa.Array.from_buffers, kind, 5, [None, *map(pa.py_buffer, (offsets.astype(dtype), text))])
        for form in (bad, pa.chunked_array([sound, bad])) if bad is not None else ():  # pyarrow may have refused it
            refused = attempt(tokenizer.encode_to_numpy, form)[1], attempt(rustbpe.Counts(pattern).add, form)[1]
            assert all(refused), f"a bad array was taken: {offsets}, {text}"


def case_junk(rng):
    """Arguments that are wrong anywhere, ids and tables that are no vocabulary: errors say so, nothing takes harm."""
    ranks, texts, pattern = random_ranks(rng), ["some text", "more"], rng.choice([*KNOWN, r"\S+|\s+"])
    tokenizer, learner, counts = rustbpe.Tokenizer.from_ranks(ranks, pattern), rustbpe.Tokenizer(), rustbpe.Counts()
    for call, *good in rng.choices([
        (learner.train_from_iterator, texts, 300, 1, pattern), (learner.train_from_counts, counts, 300),
        (lambda *junk: learner.train_from_iterator(texts, 300, threads=junk[0], progress=junk[1]), 2, None),
        (rustbpe.Tokenizer.from_ranks, ranks, pattern), (tokenizer.decode, [97]), (tokenizer.encode, "some text"),
        (tokenizer.batch_encode, texts), (tokenizer.encode_to_numpy, texts, 2), (rustbpe.Counts, pattern),
        (counts.add, texts, 2), (counts.merge, counts), (rustbpe.word_ends, "", pattern), (rustbpe.character_class, 97),
    ], k=12):
        attempt(call, *(value if rng.random() < 0.5 else junk(rng) for value in good))
    text = random_text(rng, 20) + rng.choice(["\ud800", "\udfff", "\udc00\ud800"]) + "x"
    assert isinstance(attempt(tokenizer.encode_to_numpy, [text])[1], UnicodeEncodeError), f"half a pair: {text!r}"
    token_of = {id: token for token, id in ranks.items()}
    for unknown in ([], [], [], [-1], [2**30], [2**64]):
        ids = rng.choices([*token_of], k=rng.randint(0, 3)) + unknown
        right, _ = attempt(b"".join(token_of.get(id, b"\xff") for id in ids).decode)
        assert attempt(tokenizer.decode, ids)[0] == right, f"decode({ids}) is not {right!r}"
    token, other = rng.sample(sorted(ranks), 2)
    for key, id in (*product([token], [ranks[other], -1, 2**30, 2**70, 1.5, "1"]), *product(["a", None, 1], [2**29])):
        assert attempt(rustbpe.Tokenizer.from_ranks, ranks | {key: id}, pattern)[1], f"{key!r}: {id} was taken"
    del ranks[bytes([rng.randrange(256)])]
    assert attempt(rustbpe.Tokenizer.from_ranks, ranks, pattern)[1], "a table without one of the bytes was taken"


def case_counts(rng):
    """Saved counts come back; files that are cut, changed or nonsense are refused, or read right in spite of it."""
    counts = rustbpe.Counts(rng.choice(KNOWN))
    counts.add(random_texts(rng))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counts")
        counts.save(path)
        sound = path.read_bytes()
        i, j = sorted(rng.choices(range(len(sound)), k=2))
        hit = sound[:i] + bytes(byte ^ rng.randrange(256) for byte in sound[i : i + 8]) + sound[i + 8 :]
        for data in (sound, sound[:i], sound[:i] + sound[j:], hit, sound + b"more", rng.randbytes(j)):
            path.write_bytes(data)
            loaded, error = attempt(rustbpe.Counts.load, path)
            assert data != sound if error else learnt(loaded) == learnt(counts), f"read wrongly, or not: {error!r}"
        for place in (folder, str(path / "x"), "", "\0", None, 1.5):
            assert attempt(counts.save, place)[1] and attempt(rustbpe.Counts.load, place)[1], f"{place!r} was taken"
    assert attempt(counts.merge, rustbpe.Counts(r"\S"))[1], "counts of another pattern were merged"


def case_threads(rng):
    """Several threads share a tokenizer, counts, and a tokenizer that learns all the while."""
    pattern, texts, learner = rng.choice([*KNOWN, r"\S+|\s+"]), random_texts(rng, (20, 1000)), rustbpe.Tokenizer()
    tokenizer, counts = rustbpe.Tokenizer.from_ranks(random_ranks(rng), pattern), rustbpe.Counts(pattern)
    calls = [(counts.add, texts, 1), (tokenizer.batch_encode, texts), (learner.train_from_iterator, texts, 280)]
    calls += [(counts.add, texts, 2), (learner.train_from_counts, counts, 290)]
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(*call) for call in calls * 6]
    assert all(answer.result() in (None, tokenizer.batch_encode(texts)) for answer in answers), "batch_encode differs"
    assert learnt(counts) == learnt(texts * 12, pattern), "counts that threads added to are wrong"


def case_callbacks(rng):
    """What an iterator or progress raises comes out as it is, and nothing is learnt."""
    error = rng.choice([KeyError("x"), KeyboardInterrupt(), SystemExit(3), MemoryError(), RuntimeError("y")])
    broken, texts, learner = mock.Mock(side_effect=error), ["some text", *random_texts(rng)], rustbpe.Tokenizer()
    for items, progress in ((texts, broken), (chain(texts, map(broken, [1])), None)):
        try:
            learner.train_from_iterator(items, 300, progress=progress)
            raise AssertionError(f"{error!r} of a callback was swallowed")
        except type(error) as seen:
            assert seen is error and learner.vocab_size == 256, f"{error!r} became {seen!r}, or the tokenizer changed"


CASES = [*[case_known, case_words] * 3, case_arrow, case_junk, case_counts, case_threads, case_callbacks]


def run_one(cases: list, seed: str) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(60, exit=True)
    rng = random.Random(seed)
    rng.choice(cases)(rng)


def work(seed: int, deadline: float, number, failed) -> None:
    """Case after case. Which one is under way and how many went wrong lies where it outlives this process."""
    while time.time() < deadline:
        number.value += 1
        try:
            run_one(CASES, f"{seed} {number.value}")
        except BaseException as error:  # a panic of tiktoken's is no Exception
            failed.value += 1
            if failed.value <= 20:
                print(f"FAILED case {number.value}: {f'{type(error).__name__}: {error}'[:600]!a}", flush=True)


def cycles(*_) -> None:
    """Learning, encoding, decoding, saving, and errors, 1,000 times; exits 1 where memory grows."""
    seen = []  # MiB
    for cycle in range(1, 1001):
        run_one([case_words, case_arrow, case_junk, case_counts], str(cycle % 50))  # the same inputs again and again
        if cycle % 100 == 0:
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that no leak hides there
            seen.append(psutil.Process().memory_info().rss / 2**20)
    print("MiB after 100, 200, ... cycles:", *(f"{mib:.1f}" for mib in seen), flush=True)
    raise SystemExit(seen[-1] - seen[1] > GROWTH)


def main() -> None:
    parser = argparse.ArgumentParser(description="Can rustbpe be broken?")
    parser.add_argument("--minutes", type=float, default=10, help="of random cases")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random")
    parser.add_argument("--case", type=int, help="only this case, here, with its whole traceback")
    args = parser.parse_args()
    if args.case is not None:
        return run_one(CASES, f"{args.seed} {args.case}")
    deadline, new = time.time() + 60 * args.minutes, multiprocessing.get_context("spawn")
    number, failed = new.RawValue("q", -1), new.RawValue("q", 0)
    job = work
    while job is not cycles:
        job = work if time.time() < deadline else cycles
        process = new.Process(target=job, args=(args.seed, deadline, number, failed))
        process.start()
        process.join()
        if process.exitcode:
            failed.value += 1
            print(f"FAILED {job.__name__}, case {number.value}: exit status {process.exitcode}", flush=True)
    print(f"{failed.value} failures in {number.value + 1} cases of seed {args.seed} and 1,000 cycles")
    raise SystemExit(bool(failed.value))


if __name__ == "__main__":
    main()
