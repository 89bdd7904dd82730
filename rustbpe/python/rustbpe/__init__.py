"""Byte-pair encoding: learns a vocabulary from text and encodes text in bulk.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=32768)
    ids, offsets = tokenizer.encode_to_numpy(texts)

The one idea to know: Rust sees bytes in memory and nothing of Python. Texts are handed over as
Arrow keeps strings, end to end with the places between them, and while Rust works the interpreter
is free for other threads. Here are the names, the checks, and the patterns that no scanner knows:
those are split by `regex`, word by word, and counted or encoded like the others.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np

__all__ = ["Counts", "Tokenizer", "character_class", "word_ends"]

GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
WHOLE = 1  # the scanner for which each text is a word
BATCH_CHARS = 2**22  # texts of an iterator are handed over when they are so many, or `buffer_size`
MERGES = 1000  # in one slice; between slices Ctrl-C works and progress is told


class Strings(ctypes.Structure):
    """Texts as lib.rs takes them. Keeps what it points to."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("wide", ctypes.c_int64),
        ("number", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Strings:
        data = b"".join(texts)
        offsets = np.fromiter(accumulate(map(len, texts), initial=0), np.int64, len(texts) + 1)
        strings = cls(ctypes.cast(data, ctypes.c_void_p), len(data), offsets.ctypes.data, True, len(texts))
        strings.kept = data, offsets
        return strings

    @classmethod
    def of_arrow(cls, array) -> Strings:
        """Of an Arrow array of strings without nulls, where it is."""
        _, offsets, data = array.buffers()
        wide = str(array.type) == "large_string"
        skipped = array.offset * (8 if wide else 4)
        if len(array) == 0 or offsets is None:
            return cls.of([])
        size = data.size if data else 0
        if offsets.size < skipped + (len(array) + 1) * (8 if wide else 4):
            raise ValueError(f"the Arrow array of {len(array)} texts has too few offsets")
        strings = cls(data.address if data else 0, size, offsets.address + skipped, wide, len(array))
        strings.kept = array
        return strings


class Parts:
    """Several Strings in a row, in memory, and how many texts there are."""

    def __init__(self, parts: list[Strings]):
        self.kept, self.number = parts, sum(part.number for part in parts)
        self.arguments = (Strings * len(parts))(*parts), len(parts)


def _load() -> ctypes.CDLL:
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    library = ctypes.CDLL(str(Path(__file__).with_name("core" + suffix)))
    integer, pointer, strings = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Strings)
    for name, result, *arguments in [
        ("pattern", integer, ctypes.c_char_p, integer),
        ("error", integer, pointer, integer),
        ("character_class", integer, integer),
        ("word_ends", integer, integer, ctypes.c_char_p, integer, pointer),
        ("counts_new", integer, integer),
        ("counts_free", None, pointer),
        ("counts_add", integer, pointer, strings, integer, integer),
        ("counts_add_words", integer, pointer, strings, pointer),
        ("counts_number", integer, pointer),
        ("words_new", integer, pointer, pointer, pointer),
        ("words_take", None, pointer, pointer, pointer, pointer),
        ("trainer_new", integer, pointer),
        ("trainer_free", None, pointer),
        ("trainer_merge", integer, pointer, integer, pointer),
        ("encoder_new", integer, integer, strings),
        ("encoder_free", None, pointer),
        ("encode", integer, pointer, strings, integer, integer, pointer),
        ("encoded_take", None, pointer, integer, pointer, pointer),
    ]:
        function = getattr(library, f"rustbpe_{name}")
        function.restype, function.argtypes = result, arguments
    return library


_core = _load()


def _checked(result: int) -> int:
    """What a function of the core returned, unless it failed: ValueError for bad input, RuntimeError for a bug."""
    if result != -1:
        return result
    buffer = ctypes.create_string_buffer(2000)
    size = _core.rustbpe_error(buffer, 2000)
    message = buffer.raw[:size].decode(errors="replace")
    raise (RuntimeError if message.startswith("a bug in rustbpe") else ValueError)(message)


def _owned(owner: object, kind: str, handle: int) -> int:
    """The handle, which is freed together with its owner."""
    weakref.finalize(owner, getattr(_core, f"rustbpe_{kind}_free"), handle)
    return handle


def _threads(threads: int | None) -> int:
    if threads is None:
        return os.cpu_count() or 1
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a number from 1 on, not {threads!r}")
    return threads


# -----------------------------------------------------------------------------
# Texts and words


class Splitter:
    """How a pattern cuts texts: by a scanner in Rust, or else by `regex`."""

    def __init__(self, pattern: str):
        if not isinstance(pattern, str):
            raise TypeError(f"the pattern must be a str, not {type(pattern).__name__}")
        encoded = pattern.encode()
        self.scanner, self.regex = _checked(_core.rustbpe_pattern(encoded, len(encoded))), None
        if not self.scanner:
            import regex

            try:
                self.regex = regex.compile(pattern)
            except Exception as why:  # regex.error, but also others for patterns that nobody expects
                raise ValueError(f"invalid pattern {pattern!r}: {why}") from why
            self.scanner = WHOLE

    def words(self, text: str) -> list[bytes]:
        """By `regex`; text that the pattern does not match is in no word."""
        _encoded(text)  # complains
        return [match.group().encode() for match in self.regex.finditer(text) if match.end() > match.start()]

    def prepare(self, texts) -> tuple[Parts, np.ndarray | None]:
        """Texts as the core takes them; where `regex` split them, words and where in these each text begins."""
        if self.regex is None:
            if _is_arrow(texts):
                return Parts([Strings.of_arrow(array) for array in _arrays(texts)]), None
            return Parts([Strings.of([_encoded(text) for text in _checked_texts(texts)])]), None
        texts = _from_arrow(texts) if _is_arrow(texts) else _checked_texts(texts)
        words = [self.words(text) for text in texts]
        offsets = np.fromiter(accumulate(map(len, words), initial=0), np.int64, len(words) + 1)
        return Parts([Strings.of([word for words in words for word in words])]), offsets


def _is_arrow(texts: Any) -> bool:
    return hasattr(texts, "buffers") or hasattr(texts, "iterchunks")


def _arrays(texts) -> Iterator:
    """An Arrow array of strings, or the chunks of one, without nulls: those count as ""."""
    for array in texts.iterchunks() if hasattr(texts, "iterchunks") else [texts]:
        if str(array.type) not in ("string", "large_string"):
            raise TypeError(f"the Arrow array must hold strings, not {array.type}")
        yield array.fill_null("") if array.null_count else array


def _from_arrow(texts) -> list[str]:
    return [text for array in _arrays(texts) for text in array.to_pylist()]


def _checked_texts(texts) -> Sequence[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of str or an Arrow array of strings, not {type(texts).__name__}")
    return texts


def _encoded(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    return text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair


def word_ends(text: str, pattern: str) -> np.ndarray:
    """Where each word of a text ends, in bytes of its UTF-8, by the scanner for a known pattern: int64 (words,)."""
    splitter, text = Splitter(pattern), _encoded(text)
    if splitter.regex:
        raise ValueError(f"there is no scanner for the pattern {pattern!r}")
    ends = np.empty(len(text), np.int64)
    number = _checked(_core.rustbpe_word_ends(splitter.scanner, text, len(text), ends.ctypes.data))
    return ends[:number].copy()


def character_class(code_point: int) -> int:
    """Flags of a character: 1 letter, 2 number, 4 space, 8 newline, 16 and 32 as in split.rs."""
    return _checked(_core.rustbpe_character_class(code_point))


# -----------------------------------------------------------------------------
# Counts


class Counts:
    """How often each word occurs: all that training needs to know of a text.

    Counts of parts of a text, made at other times or on other machines, add up to the counts of
    the whole. Several threads may add at the same time.
    """

    def __init__(self, pattern: str | None = None):
        self.pattern = GPT4_PATTERN if pattern is None else pattern
        self._splitter = Splitter(self.pattern)
        self._handle = _owned(self, "counts", _checked(_core.rustbpe_counts_new(self._splitter.scanner)))

    def add(self, texts, threads: int | None = None) -> None:
        """Count the words of texts: list[str], or an Arrow array (also chunked) of strings. Threads: None for all cores."""
        threads = _threads(threads)
        parts, _ = self._splitter.prepare(texts)
        _checked(_core.rustbpe_counts_add(self._handle, *parts.arguments, threads))

    def merge(self, other: Counts) -> None:
        """Add what another counted, with the same pattern (else ValueError)."""
        if _counts(other).pattern != self.pattern:
            raise ValueError(f"the other counts are of another pattern: {other.pattern!r}, not {self.pattern!r}")
        self._add_words(*other._words())

    def save(self, path: str | Path) -> None:
        """Write a file in NumPy's .npz format: "pattern", and of all words in order "bytes", "ends" and "counts"."""
        data, ends, counts = self._words()
        with open(path, "wb") as file:
            np.savez(file, pattern=np.frombuffer(self.pattern.encode(), np.uint8), bytes=data, ends=ends, counts=counts)

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """What `save` wrote. Raises ValueError where the file is damaged; executes nothing that is in it."""
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    pattern, words = arrays["pattern"], (arrays["bytes"], arrays["ends"], arrays["counts"])
                types = [pattern.dtype, *(array.dtype for array in words)]
                if types != [np.uint8, np.uint8, np.uint64, np.uint64] or len(words[1]) != len(words[2]):
                    raise ValueError("its arrays are not what they should be")
                counts = cls(bytes(pattern).decode())
                counts._add_words(*words)
                return counts
            except Exception as why:  # a damaged zip file can raise nearly anything
                raise ValueError(f"{path} is not a file of counts, or it is damaged: {why}") from why

    def __len__(self) -> int:
        """How many different words there are."""
        return _checked(_core.rustbpe_counts_number(self._handle))

    def _words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of all words end to end, where each ends, and how often it occurs; sorted."""
        number, size = ctypes.c_int64(), ctypes.c_int64()
        words = _checked(_core.rustbpe_words_new(self._handle, ctypes.byref(number), ctypes.byref(size)))
        arrays = np.empty(size.value, np.uint8), np.empty(number.value, np.uint64), np.empty(number.value, np.uint64)
        _core.rustbpe_words_take(words, *(array.ctypes.data for array in arrays))
        return arrays

    def _add_words(self, data: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> None:
        data, counts = np.ascontiguousarray(data), np.ascontiguousarray(counts)
        offsets = np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)])
        strings = Strings(data.ctypes.data, len(data), offsets.ctypes.data, True, len(ends))
        _checked(_core.rustbpe_counts_add_words(self._handle, strings, counts.ctypes.data))


def _counts(counts: Counts) -> Counts:
    if not isinstance(counts, Counts):
        raise TypeError(f"these must be Counts, not {type(counts).__name__}")
    return counts


# -----------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """A vocabulary: learnt by `train_from_iterator` or made of known ranks. Threads may share one that is trained."""

    def __init__(self):
        self._pattern = ""
        self._tokens = {id: bytes([id]) for id in range(256)}  # id -> bytes, in the order of the ids
        self._encoder = None

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], pattern: str) -> Tokenizer:
        """The tokenizer of tokens whose ids are also their ranks: the pair that makes the lowest is joined first.

        Raises ValueError unless each of the 256 bytes has a token and all ids differ.
        """
        if not isinstance(ranks, dict):
            raise TypeError(f"ranks must be a dict, token -> id, not {type(ranks).__name__}")
        tokenizer = cls()
        tokenizer._set({id: bytes(token) for token, id in ranks.items()}, pattern, len(ranks))
        return tokenizer

    def _set(self, tokens: dict[int, bytes], pattern: str, number: int) -> None:
        if len(tokens) < number:
            raise ValueError("some tokens share an id")
        if not all(isinstance(id, int) and 0 <= id < 2**30 for id in tokens):
            raise ValueError("ids must be whole numbers from 0 to 2**30")
        tokens = dict(sorted(tokens.items()))
        self._encoder = Encoder(tokens, pattern)
        self._pattern, self._tokens = pattern, tokens

    # -------------------------------------------------------------------------
    # Training

    def train_from_iterator(
        self,
        iterator: Iterable,
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        threads: int | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> None:
        """Learn a vocabulary of 256 bytes and then merges: the most frequent pair, among equals that of the lower ids.

        Args:
            iterator: texts (str) or Arrow arrays of strings, of which no Python strings are made.
            vocab_size: tokens to learn; there are fewer where no pair is left.
            buffer_size: texts that are handed to Rust at a time.
            pattern: splits texts into words; None is GPT-4's.
            threads: that count words; None for all cores. The result does not depend on it.
            progress: called as progress(merges learnt, merges wanted) after every 1,000 merges and at the end.

        Raises ValueError or TypeError, or what the iterator and `progress` raise; the tokenizer is then as it was.
        """
        _check_vocab_size(vocab_size)
        if not isinstance(buffer_size, int) or buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, not {buffer_size!r}")
        threads, counts = _threads(threads), Counts(pattern)
        batch, size = [], 0
        for text in iterator:
            if _is_arrow(text):
                counts.add(text, threads)
                continue
            if not isinstance(text, str):
                raise TypeError(f"a text must be a str or an Arrow array of strings, not {type(text).__name__}")
            batch.append(text)
            size += len(text)
            if len(batch) >= buffer_size or size >= BATCH_CHARS:
                counts.add(batch, threads)
                batch, size = [], 0
        counts.add(batch, threads)
        del batch
        self.train_from_counts(counts, vocab_size, progress=progress)

    def train_from_counts(
        self, counts: Counts, vocab_size: int, *, progress: Callable[[int, int], Any] | None = None
    ) -> None:
        """Learn a vocabulary from counts; all else as in `train_from_iterator`."""
        _check_vocab_size(vocab_size)
        trainer = Trainer(_counts(counts))
        tokens, wanted = [bytes([byte]) for byte in range(256)], vocab_size - 256
        while (learnt := len(tokens) - 256) < wanted:
            pairs = trainer.merge(min(MERGES, wanted - learnt))
            tokens += _joined(tokens, pairs)
            if progress is not None:
                progress(len(tokens) - 256, wanted)
            if not len(pairs):
                break
        self._set(dict(enumerate(tokens)), counts.pattern, len(tokens))

    # -------------------------------------------------------------------------
    # The vocabulary

    def get_pattern(self) -> str:
        """The pattern that splits texts; "" before training."""
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(token, id) of all tokens in the order of their ids."""
        return [(token, id) for id, token in self._tokens.items()]

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    # -------------------------------------------------------------------------
    # Encoding

    def encode_to_numpy(self, texts, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of texts, end to end, and where each text's begin.

        Args:
            texts: list[str], or an Arrow array (also chunked) of strings, in which null counts as "".
            threads: None for all cores. Texts are shared out among them.

        Returns ids, uint16 where all ids of the vocabulary are below 65536, else uint32; and offsets, int64 of
        shape (len(texts) + 1,). Special tokens written out in a text are text.

        Raises ValueError before training, and UnicodeEncodeError (a ValueError) for half a surrogate pair.
        """
        if self._encoder is None:
            raise ValueError("this tokenizer has no vocabulary yet: train it first")
        return self._encoder.encode(texts, _threads(threads))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.encode_to_numpy([text], threads=1)[0].tolist()

    def batch_encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each of several texts, on all cores."""
        ids, offsets = self.encode_to_numpy(texts)
        return [ids[start:end].tolist() for start, end in zip(offsets[:-1], offsets[1:])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Raises ValueError for an unknown id, UnicodeDecodeError for bytes that are no text."""
        try:
            return b"".join([self._tokens[id] for id in ids]).decode()
        except KeyError as unknown:
            raise ValueError(f"unknown token id: {unknown}") from None


class Trainer:
    def __init__(self, counts: Counts):
        self._handle = _owned(self, "trainer", _checked(_core.rustbpe_trainer_new(counts._handle)))

    def merge(self, wanted: int) -> np.ndarray:
        """The next merges, (left id, right id) each: uint32 of shape (up to wanted, 2)."""
        pairs = np.empty((wanted, 2), np.uint32)
        return pairs[: _checked(_core.rustbpe_trainer_merge(self._handle, wanted, pairs.ctypes.data))]


class Encoder:
    """The core's encoder, for which ids are 0, 1, 2, ..., and the ids that these stand for where there are gaps."""

    def __init__(self, tokens: dict[int, bytes], pattern: str):
        self.splitter = Splitter(pattern)
        strings = Strings.of(list(tokens.values()))
        self._handle = _owned(self, "encoder", _checked(_core.rustbpe_encoder_new(self.splitter.scanner, strings)))
        self.dtype = np.uint16 if max(tokens) < 2**16 else np.uint32
        self.ids = None if max(tokens) == len(tokens) - 1 else np.fromiter(tokens, self.dtype, len(tokens))

    def encode(self, texts, threads: int) -> tuple[np.ndarray, np.ndarray]:
        (parts, offsets_in_words), number = self.splitter.prepare(texts), ctypes.c_int64()
        encoded = _checked(_core.rustbpe_encode(self._handle, *parts.arguments, threads, ctypes.byref(number)))
        ids = np.empty(number.value, self.dtype)
        offsets = np.empty(parts.number + 1, np.int64)
        _core.rustbpe_encoded_take(encoded, self.dtype is np.uint32, ids.ctypes.data, offsets.ctypes.data)
        if self.ids is not None:
            ids = self.ids[ids]
        return ids, offsets if offsets_in_words is None else offsets[offsets_in_words]


def _check_vocab_size(vocab_size: int) -> None:
    if not isinstance(vocab_size, int) or not 256 <= vocab_size < 2**30:
        raise ValueError(f"vocab_size must be a number from 256 (all bytes) on, not {vocab_size!r}")


def _joined(tokens: list[bytes], pairs: np.ndarray) -> list[bytes]:
    """The tokens that these merges make, one after the other."""
    tokens = tokens.copy()
    first = len(tokens)
    for left, right in pairs.tolist():
        tokens.append(tokens[left] + tokens[right])
    return tokens[first:]
