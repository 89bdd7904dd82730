"""How Python's texts reach the core, and what the core calls its own.

The one idea to know: Rust sees bytes in memory and nothing of Python. Texts are handed over as
Arrow keeps strings, end to end with the places between them. Patterns that no scanner knows are
split here by `regex`, and each word is handed over like a text.
"""

from __future__ import annotations

import ctypes
import operator
import sys
import weakref
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np

WHOLE = 1  # the scanner for which each text is a word


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


def _load() -> ctypes.CDLL:
    name = {"win32": "rustbpe.dll", "darwin": "librustbpe.dylib"}.get(sys.platform, "librustbpe.so")
    library = ctypes.CDLL(str(Path(__file__).with_name(name)))
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
        ("words_free", None, pointer),
        ("words_copy", None, pointer, pointer, pointer, pointer),
        ("trainer_new", integer, pointer),
        ("trainer_free", None, pointer),
        ("trainer_merge", integer, pointer, integer, pointer),
        ("encoder_new", integer, integer, strings),
        ("encoder_free", None, pointer),
        ("encode", integer, pointer, strings, integer, integer, pointer),
        ("encoded_free", None, pointer),
        ("encoded_copy", None, pointer, integer, pointer, pointer),
    ]:
        function = getattr(library, f"rustbpe_{name}")
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()


def checked(result: int) -> int:
    """What a function of the core returned, unless it failed: ValueError for bad input, RuntimeError for a bug."""
    if result != -1:
        return result
    buffer = ctypes.create_string_buffer(2000)
    size = lib.rustbpe_error(buffer, 2000)
    message = buffer.raw[:size].decode(errors="replace")
    raise (RuntimeError if message.startswith("a bug in rustbpe") else ValueError)(message)


class Handle(ctypes.c_void_p):
    """What a function of the core made. It is freed together with this object, which stays in this process."""

    def __init__(self, kind: str, made: int):
        super().__init__(checked(made))
        free = weakref.finalize(self, getattr(lib, f"rustbpe_{kind}_free"), self.value)
        free.atexit = False  # other threads may still be at work then

    def __reduce__(self):
        raise TypeError("what lies in the memory of Rust cannot be copied or pickled; save counts to a file")


def scanner_for(pattern: str) -> int:
    """The number of the scanner that splits by this pattern, exactly as tiktoken does; 0 where there is none."""
    if not isinstance(pattern, str):
        raise TypeError(f"the pattern must be a str, not {type(pattern).__name__}")
    spelt = pattern.encode()
    return checked(lib.rustbpe_pattern(spelt, len(spelt)))


class Splitter:
    """How a pattern cuts texts: by a scanner in Rust, or else by `regex`."""

    def __init__(self, pattern: str):
        self.scanner, self.regex = scanner_for(pattern), None
        if not self.scanner:
            import regex

            try:
                self.regex = regex.compile(pattern)
            except Exception as why:  # regex.error, but also others for patterns that nobody expects
                raise ValueError(f"invalid pattern {pattern!r}: {why}") from why
            self.scanner = WHOLE

    def words(self, text: str) -> list[bytes]:
        """By `regex`; text that the pattern does not match is in no word."""
        encoded(text)  # complains
        return [match.group().encode() for match in self.regex.finditer(text) if match.end() > match.start()]

    def prepare(self, texts) -> tuple[list[Strings], np.ndarray | None]:
        """Texts as the core takes them; where `regex` split them, words and where in these each text begins."""
        if self.regex is None:
            if is_arrow(texts):
                return [Strings.of_arrow(array) for array in _arrays(texts)], None
            return [Strings.of([encoded(text) for text in _checked_texts(texts)])], None
        texts = _from_arrow(texts) if is_arrow(texts) else _checked_texts(texts)
        words = [self.words(text) for text in texts]
        offsets = np.fromiter(accumulate(map(len, words), initial=0), np.int64, len(words) + 1)
        return [Strings.of(list(chain.from_iterable(words)))], offsets


def is_arrow(texts: Any) -> bool:
    return hasattr(texts, "buffers") or hasattr(texts, "iterchunks")


def _arrays(texts) -> Iterator:
    """An Arrow array of strings, or the chunks of one, without nulls: those count as ""."""
    for array in texts.iterchunks() if hasattr(texts, "iterchunks") else [texts]:
        if str(array.type) not in ("string", "large_string"):
            raise TypeError(f"the Arrow array must hold string or large_string (cast it), not {array.type}")
        yield array.fill_null("") if array.null_count else array


def _from_arrow(texts) -> list[str]:
    arrays = list(_arrays(texts))
    for array in arrays:
        array.validate(full=True)  # ArrowInvalid, a ValueError
    return [text for array in arrays for text in array.to_pylist()]


def _checked_texts(texts) -> Sequence[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of str or an Arrow array of strings, not {type(texts).__name__}")
    return texts


def encoded(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    return text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair


def in_a_row(parts: list[Strings]) -> tuple[ctypes.Array, int]:
    """How functions of the core take several Strings; `parts` must live as long as the call."""
    return (Strings * len(parts))(*parts), len(parts)


def whole_number(name: str, value: int, least: int, limit: int = 2**31) -> int:
    """The value as an int; TypeError or ValueError unless it is a whole number from `least` to below `limit`."""
    number = operator.index(value)
    if not least <= number < limit:
        raise ValueError(f"{name} must be from {least} to {limit - 1}, not {number}")
    return number
