"""Byte-pair encoding: trains a vocabulary and encodes text in bulk, with exactly tiktoken's ids.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=32768)
    ids, offsets = tokenizer.encode_to_numpy(texts)

The work is done in Rust, called by ctypes, so that other Python threads run meanwhile. There is one split pattern
only, PATTERN, which is nanochat's; any other is refused.
"""

from __future__ import annotations

import ctypes
import operator
import sys
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np

__all__ = ["PATTERN", "Tokenizer"]

PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)
BATCH_CHARS = 2**22  # training texts that are counted at a time
MERGES = 1000  # learned at a time; in between, Ctrl-C works
MAX_TOKENS = 2**21 - 1  # limited by ID_BITS in encode.rs


class Tokenizer:
    """A vocabulary: the 256 bytes at first, then what `train_from_iterator` learned. Threads may share it."""

    def __init__(self):
        self._set_tokens([bytes([byte]) for byte in range(256)])

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], pattern: str = PATTERN) -> Tokenizer:
        """The tokenizer of tokens with ids 0, 1, 2, ...; the pair that makes the lowest id is merged first.

        Raises ValueError if the ids are others, a byte has no token, or the pattern is not PATTERN.
        """
        _check_pattern(pattern)
        tokens = sorted(ranks, key=lambda token: ranks[token])
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError(f"the ids of {len(tokens)} tokens must be 0 to {len(tokens) - 1}, each for one token")
        tokenizer = cls()
        tokenizer._set_tokens(tokens)
        return tokenizer

    def _set_tokens(self, tokens: list[bytes]) -> None:
        self._encoder = Handle("encoder", *_end_to_end(tokens), len(tokens))
        self._tokens, self._dtype = tokens, np.uint16 if len(tokens) <= 2**16 else np.uint32

    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, pattern: str = PATTERN, threads: int | None = None
    ) -> None:
        """Train a vocabulary of 256 bytes and then merges: the most frequent pair, among equals that of the lower ids.

        Args:
            iterator: texts.
            vocab_size: the number of tokens; there are fewer if no pair is left.
            pattern: PATTERN; a parameter for compatibility with the published package.
            threads: that count words, None for all cores. The result does not depend on it.

        Raises ValueError or TypeError for bad arguments, or what the iterator raises; the tokenizer is then unchanged.
        """
        _check_pattern(pattern)
        vocab_size, threads = _integer("vocab_size", vocab_size, 256, MAX_TOKENS), _threads(threads)
        if isinstance(iterator, str):
            raise TypeError("train_from_iterator takes an iterator of texts, not one text")
        counts, batch, size = Handle("counts"), [], 0
        for text in iterator:
            batch.append(_utf8(text))
            size += len(text)
            if size >= BATCH_CHARS:
                _count(counts, batch, threads)
                batch, size = [], 0
        _count(counts, batch, threads)
        self._set_tokens(_train(counts, vocab_size))

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(token, id) of all tokens in the order of their ids."""
        return [(token, id) for id, token in enumerate(self._tokens)]

    def encode_to_numpy(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts concatenated, and where each text's begin: int64 of shape (len(texts) + 1,).

        The ids are uint16 in a vocabulary of up to 65,536 tokens, else uint32. Special tokens spelled out in a text are
        text. `threads` None: all cores. Raises UnicodeEncodeError (a ValueError) for a lone surrogate.
        """
        if isinstance(texts, str):
            raise TypeError("encode_to_numpy takes a list of texts, not one text")
        threads = _threads(threads)
        data, offsets = _end_to_end([_utf8(text) for text in texts])
        ids, text_offsets = np.empty(len(data), self._dtype), np.empty(len(offsets), np.int64)
        arguments = len(offsets) - 1, threads, ids.itemsize, ids.ctypes.data, text_offsets
        number = _checked(lib.rustbpe_encode(self._encoder, data, offsets, *arguments))
        ids.resize(number, refcheck=False)
        return ids, text_offsets

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_to_numpy([text], threads=1)[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Raises ValueError for an unknown id, UnicodeDecodeError for bytes that are not UTF-8."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(self._tokens):
            raise ValueError(f"ids must be 0 to {len(self._tokens) - 1}, but there are {min(ids)} to {max(ids)}")
        return b"".join([self._tokens[id] for id in ids]).decode()


def _count(counts: Handle, texts: list[bytes], threads: int) -> None:
    data, offsets = _end_to_end(texts)
    _checked(lib.rustbpe_counts_add(counts, data, offsets, len(texts), threads))


def _train(counts: Handle, vocab_size: int) -> list[bytes]:
    trainer, pairs = Handle("trainer", counts), np.empty((MERGES, 2), np.uint32)
    tokens, number = [bytes([byte]) for byte in range(256)], MERGES
    while number == MERGES and len(tokens) < vocab_size:
        number = _checked(lib.rustbpe_trainer_merge(trainer, min(MERGES, vocab_size - len(tokens)), pairs.ctypes.data))
        for left, right in pairs[:number].tolist():
            tokens.append(tokens[left] + tokens[right])
    return tokens


# -----------------------------------------------------------------------------
# Arguments


def _check_pattern(pattern: str) -> None:
    if pattern != PATTERN:
        raise ValueError(f"this rustbpe splits by rustbpe.PATTERN only (for others use tiktoken), not by {pattern!r}")


def _integer(name: str, value: int, least: int, most: int = 2**31) -> int:
    value = operator.index(value)
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, not {value}")
    return value


def _threads(threads: int | None) -> int:
    """As Rust takes it: 0 for one thread per core."""
    return 0 if threads is None else _integer("threads", threads, 1)


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    return text.encode()


def _end_to_end(strings: list[bytes]) -> tuple[bytes, np.ndarray]:
    """How strings are passed to Rust: [b"ab", b"c"] -> (b"abc", [0, 2, 3])."""
    return b"".join(strings), np.fromiter(accumulate(map(len, strings), initial=0), np.int64, len(strings) + 1)


# -----------------------------------------------------------------------------
# The library


def _load() -> ctypes.CDLL:
    name = {"win32": "rustbpe.dll", "darwin": "librustbpe.dylib"}.get(sys.platform, "librustbpe.so")
    library = ctypes.CDLL(str(Path(__file__).with_name(name)))
    integer, pointer, data, offsets = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p, np.ctypeslib.ndpointer(np.int64)
    for name, *arguments in [
        ("error", pointer, integer),
        ("counts_new",),
        ("counts_add", pointer, data, offsets, integer, integer),
        ("trainer_new", pointer),
        ("trainer_merge", pointer, integer, pointer),
        ("encoder_new", data, offsets, integer),
        ("encode", pointer, data, offsets, integer, integer, integer, pointer, offsets),
    ]:
        function = getattr(library, f"rustbpe_{name}")
        function.restype, function.argtypes = integer, arguments
    for name in ("counts", "trainer", "encoder"):
        function = getattr(library, f"rustbpe_{name}_free")
        function.restype, function.argtypes = None, [pointer]
    return library


lib = _load()


def _checked(result: int) -> int:
    """The result of a Rust function; ValueError if it refused its input, RuntimeError if it panicked."""
    if result != -1:
        return result
    buffer = ctypes.create_string_buffer(2000)
    message = buffer[: lib.rustbpe_error(buffer, 2000)].decode(errors="replace")
    raise (RuntimeError if message.startswith("a bug in rustbpe") else ValueError)(message)


class Handle(ctypes.c_void_p):
    """A Rust object, freed together with this one: `Handle("encoder", ...)` calls `rustbpe_encoder_new(...)`."""

    def __init__(self, kind: str, *arguments):
        super().__init__(_checked(getattr(lib, f"rustbpe_{kind}_new")(*arguments)))
        free = weakref.finalize(self, getattr(lib, f"rustbpe_{kind}_free"), self.value)
        free.atexit = False  # other threads may still use it then
