"""Byte-pair encoding: learns a vocabulary from text and encodes text in bulk.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=32768)
    ids, offsets = tokenizer.encode_to_numpy(texts)

The one idea to know: here are the names and the checks, in Rust the work, and while Rust works the
interpreter is free for other threads. core.py knows how texts get there.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np

from rustbpe.core import Handle, Splitter, Strings, checked, encoded, in_a_row, is_arrow, lib, scanner_for, whole_number

__all__ = ["Counts", "Tokenizer", "character_class", "is_known", "word_ends"]

GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
BATCH_CHARS = 2**22  # texts of an iterator are handed over when they are so many, or `buffer_size`
MERGES = 1000  # in one slice; between slices Ctrl-C works and progress is told
MOST_TOKENS = 2**21  # one more than fit into the encoder's table


def is_known(pattern: str) -> bool:
    """Whether a scanner in Rust splits by this pattern, exactly as tiktoken does; otherwise `regex` splits."""
    return scanner_for(pattern) != 0


def word_ends(text: str, pattern: str) -> np.ndarray:
    """Where each word of a text ends, in bytes of its UTF-8, by the scanner for a known pattern: int64 (words,)."""
    scanner, text = scanner_for(pattern), encoded(text)
    if not scanner:
        raise ValueError(f"there is no scanner for the pattern {pattern!r}")
    ends = np.empty(len(text), np.int64)
    number = checked(lib.rustbpe_word_ends(scanner, text, len(text), ends.ctypes.data))
    return ends[:number].copy()


def character_class(code_point: int) -> int:
    """Flags of a character: 1 letter, 2 number, 4 space, 8 newline, 16 and 32 as in split.rs."""
    return checked(lib.rustbpe_character_class(whole_number("a code point", code_point, 0, 0x110000)))


# -----------------------------------------------------------------------------
# Counts


class Counts:
    """How often each word occurs: all that training needs to know of a text.

    Counts of parts of a text, made at other times or on other machines, add up to the counts of
    the whole. Several threads may add at the same time; whatever reads waits until they are done.
    """

    def __init__(self, pattern: str | None = None):
        self.pattern = GPT4_PATTERN if pattern is None else pattern
        self._splitter = Splitter(self.pattern)
        self._handle = Handle("counts", lib.rustbpe_counts_new(self._splitter.scanner))

    def add(self, texts, threads: int | None = None) -> None:
        """Count the words of texts: list[str], or an Arrow array (also chunked) of strings. Threads: None for all cores."""
        parts, _ = self._splitter.prepare(texts)
        checked(lib.rustbpe_counts_add(self._handle, *in_a_row(parts), _threads(threads)))

    def merge(self, other: Counts) -> None:
        """Add what another counted, with the same pattern (else ValueError)."""
        if _counts(other).pattern != self.pattern:
            raise ValueError(f"the other counts are of another pattern: {other.pattern!r}, not {self.pattern!r}")
        self._add_words(*other._words())

    def save(self, path: str | Path) -> None:
        """Write a file in NumPy's .npz format: "pattern", and of all words in order "bytes", "ends" and "counts"."""
        data, ends, counts = self._words()
        aside = Path(f"{path}.part")  # so that a file of before is there until this one is whole
        try:
            with open(aside, "wb") as file:
                pattern = np.frombuffer(self.pattern.encode(), np.uint8)
                np.savez(file, pattern=pattern, bytes=data, ends=ends, counts=counts)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """What `save` wrote. Raises ValueError where the file is damaged; executes nothing that is in it."""
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    pattern, words = arrays["pattern"], (arrays["bytes"], arrays["ends"], arrays["counts"])
                types = [pattern.dtype, *(array.dtype for array in words)]
                flat = pattern.ndim == 1 and all(array.ndim == 1 for array in words)
                if types != [np.uint8, np.uint8, np.uint64, np.uint64] or not flat or len(words[1]) != len(words[2]):
                    raise ValueError("its arrays are not what they should be")
                counts = cls(bytes(pattern).decode())
                counts._add_words(*words)
                return counts
            except Exception as why:  # a damaged zip file can raise nearly anything
                raise ValueError(f"{path} is not a file of counts, or it is damaged: {why}") from why

    def __len__(self) -> int:
        """How many different words there are."""
        return checked(lib.rustbpe_counts_number(self._handle))

    def _words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of all words end to end, where each ends, and how often it occurs; sorted."""
        number, size = ctypes.c_int64(), ctypes.c_int64()
        words = Handle("words", lib.rustbpe_words_new(self._handle, ctypes.byref(number), ctypes.byref(size)))
        arrays = np.empty(size.value, np.uint8), np.empty(number.value, np.uint64), np.empty(number.value, np.uint64)
        lib.rustbpe_words_copy(words, *(array.ctypes.data for array in arrays))
        return arrays

    def _add_words(self, data: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> None:
        data, counts = np.ascontiguousarray(data), np.ascontiguousarray(counts)
        offsets = np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)])
        strings = Strings(data.ctypes.data, len(data), offsets.ctypes.data, True, len(ends))
        checked(lib.rustbpe_counts_add_words(self._handle, strings, counts.ctypes.data))


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
        if not all(isinstance(token, bytes) for token in ranks):
            raise TypeError("tokens must be bytes")
        tokens = {whole_number("an id", id, 0, 2**30): token for token, id in ranks.items()}
        if len(tokens) < len(ranks):
            raise ValueError(f"{len(ranks)} tokens have only {len(tokens)} different ids")
        tokenizer = cls()
        tokenizer._set(tokens, pattern)
        return tokenizer

    def __reduce__(self):
        if self._encoder is None:
            return Tokenizer, ()
        return Tokenizer.from_ranks, (dict(self.get_mergeable_ranks()), self._pattern)

    def _set(self, tokens: dict[int, bytes], pattern: str) -> None:
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
            progress: called as progress(merges learnt, merges wanted) after every 1,000 merges and the last.

        Raises ValueError or TypeError, or what the iterator and `progress` raise; the tokenizer is then as it was.
        """
        whole_number("vocab_size", vocab_size, 256, MOST_TOKENS)
        buffer_size, counts = whole_number("buffer_size", buffer_size, 1), Counts(pattern)
        if isinstance(iterator, str) or is_arrow(iterator):
            raise TypeError("texts must come as an iterator or a list of them; put a single one into a list")
        batch, size = [], 0
        for text in iterator:
            if is_arrow(text):
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
        vocab_size = whole_number("vocab_size", vocab_size, 256, MOST_TOKENS)
        trainer = Handle("trainer", lib.rustbpe_trainer_new(_counts(counts)._handle))
        tokens, pairs = [bytes([byte]) for byte in range(256)], np.empty((MERGES, 2), np.uint32)
        while len(tokens) < vocab_size:
            wanted = min(MERGES, vocab_size - len(tokens))
            learnt = checked(lib.rustbpe_trainer_merge(trainer, wanted, pairs.ctypes.data))
            if learnt == 0:
                break
            for left, right in pairs[:learnt].tolist():
                tokens.append(tokens[left] + tokens[right])
            if progress is not None:
                progress(len(tokens) - 256, vocab_size - 256)
        self._set(dict(enumerate(tokens)), counts.pattern)

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


class Encoder:
    """The core's encoder, for which ids are 0, 1, 2, ..., and the ids that these stand for where there are gaps."""

    def __init__(self, tokens: dict[int, bytes], pattern: str):
        self.splitter = Splitter(pattern)
        strings = Strings.of(list(tokens.values()))
        self._handle = Handle("encoder", lib.rustbpe_encoder_new(self.splitter.scanner, strings))
        self.dtype = np.uint16 if max(tokens) < 2**16 else np.uint32
        self.ids = None if max(tokens) == len(tokens) - 1 else np.fromiter(tokens, self.dtype, len(tokens))

    def encode(self, texts, threads: int) -> tuple[np.ndarray, np.ndarray]:
        (parts, offsets_in_words), number = self.splitter.prepare(texts), ctypes.c_int64()
        made = lib.rustbpe_encode(self._handle, *in_a_row(parts), threads, ctypes.byref(number))
        waiting, ids = Handle("encoded", made), np.empty(number.value, self.dtype)
        offsets = np.empty(sum(part.number for part in parts) + 1, np.int64)
        lib.rustbpe_encoded_copy(waiting, self.dtype is np.uint32, ids.ctypes.data, offsets.ctypes.data)
        if self.ids is not None:
            ids = self.ids[ids]
        return ids, offsets if offsets_in_words is None else offsets[offsets_in_words]


def _threads(threads: int | None) -> int:
    """As the core has it: 0 for all cores that this process may use."""
    return 0 if threads is None else whole_number("threads", threads, 1)
