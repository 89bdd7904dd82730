"""Byte-level BPE tokenizer in the GPT-4 manner: train, encode, decode, save, load.

rustbpe trains and encodes in bulk, tiktoken encodes single prompts; both return the same ids. Special tokens in
ordinary text are text. Nothing is normalised: `decode(encode(text)) == text`, except for lone surrogates, which
UTF-8 cannot hold and which become U+FFFD.

A vocabulary is stored as data that cannot execute: the split pattern, the special tokens, the tokens in order of their
ids (base64, since most are not text), and a checksum over all three, in JSON.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import multiprocessing
import os
import re
from functools import cached_property
from itertools import chain, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Sequence

from nanochat.common import UserError, atomic, get_base_dir, print0
from nanochat.conversation import PARTS, render_conversation, render_for_completion

if TYPE_CHECKING:
    import numpy as np
    import torch

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a call of the calculator
    "<|python_end|>",
    "<|output_start|>",  # its result
    "<|output_end|>",
]

# GPT-4's pattern, but with numbers grouped by at most 2 digits instead of 3, since a small vocabulary
# has better uses for 1,000 entries than three-digit numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)

# tiktoken's regex engine panics at a million blanks. Longer runs are split, for training and encoding alike.
MAX_BLANKS = 100_000
DOWNLOAD_TIMEOUT = 15.0  # seconds for a published vocabulary (under 3 MB)
MAX_VOCAB_SIZE = 2**21 - 1  # as rustbpe's
VOCABULARY_FILE = "vocabulary.json"


class RustBPETokenizer:
    """Text to token ids and back. Safe to share between threads."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]):
        import tiktoken

        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)

    @classmethod
    def train_from_iterator(cls, iterator: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """Train a vocabulary of 256 bytes, merges and special tokens. UserError if the texts do not have so many merges."""
        if isinstance(iterator, str):
            raise TypeError("train_from_iterator takes an iterator of texts, not one text")
        num_special = len(SPECIAL_TOKENS)
        if not 256 + num_special <= vocab_size <= MAX_VOCAB_SIZE:
            limits = f"from {256 + num_special} (bytes and special tokens) to {MAX_VOCAB_SIZE:,}"
            raise UserError(f"a vocabulary of {vocab_size} tokens is not possible: their number must be {limits}")
        import rustbpe

        trainer = rustbpe.Tokenizer()
        segments = (segment for text in iterator for segment in encodable_segments(text))
        trainer.train_from_iterator(segments, vocab_size - num_special, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) + num_special < vocab_size:
            raise UserError(
                f"this text supports a vocabulary of at most {len(ranks) + num_special} tokens, not {vocab_size}; "
                "train on more text or ask for a smaller vocabulary"
            )
        return cls(ranks, SPLIT_PATTERN, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_directory(cls, directory: str | Path) -> RustBPETokenizer:
        """Load what `save` wrote. UserError if there is nothing or it is damaged."""
        path = Path(directory) / VOCABULARY_FILE
        if not path.is_file():
            raise UserError(f"there is no tokenizer in {directory} yet; run `python -m scripts.tok_train` first")
        try:
            contents = json.loads(path.read_bytes())
            body = {name: contents[name] for name in ("pattern", "special_tokens", "tokens")}
            if contents["sha256"] != _checksum(body):
                raise ValueError("its checksum does not match: it was damaged or edited")
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(body["tokens"])}
            check_vocabulary(ranks, body["special_tokens"])
            return cls(ranks, body["pattern"], body["special_tokens"])
        except Exception as cause:  # a damaged file can raise nearly anything
            raise UserError(f"the tokenizer in {path} cannot be used ({cause!r}); restore it or train a new one") from cause

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> RustBPETokenizer:
        """A published vocabulary that tiktoken knows ("gpt2", "cl100k_base") and caches. UserError if it cannot be fetched."""
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

        try:
            with ThreadPool(1) as pool:  # requests alone may wait for minutes
                parts = pool.apply_async(ENCODING_CONSTRUCTORS[tiktoken_name]).get(DOWNLOAD_TIMEOUT)
        except (OSError, ValueError, KeyError, multiprocessing.TimeoutError) as cause:  # network errors are OSErrors
            raise UserError(
                f"the vocabulary {tiktoken_name!r} cannot be fetched by tiktoken ({type(cause).__name__}); "
                "connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from cause
        return cls(parts["mergeable_ranks"], parts["pat_str"], parts["special_tokens"])

    def save(self, directory: str | Path) -> None:
        """Write the vocabulary into a folder, completely or not at all."""
        tokens = [base64.b64encode(token).decode() for token in self._tokens()]
        body = {"pattern": self.pattern, "special_tokens": self.special_tokens, "tokens": tokens}
        contents = {"format": "nanochat-bpe-1", "sha256": _checksum(body), **body}
        with atomic(Path(directory) / VOCABULARY_FILE) as tmp:
            tmp.write_text(json.dumps(contents, indent=0), encoding="utf-8")

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def _tokens(self) -> list[bytes]:
        """The tokens in order of their ids, without the special ones."""
        return sorted(self.ranks, key=self.ranks.get)

    def fingerprint(self) -> str:
        """A checksum of the tokens and their ids, by which a model's tokenizer is recognised."""
        vocabulary = self._tokens(), self.pattern, sorted(self.special_tokens.items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def get_special_tokens(self) -> set[str]:
        return set(self.special_tokens)

    @cached_property
    def longest_token(self) -> int:
        """The most bytes that a token has, special ones apart: a text of n bytes has at least n / longest_token tokens."""
        return max(map(len, self.ranks))

    def encode_special(self, name: str) -> int:
        """The id of a special token: `encode_special("<|bos|>")`."""
        if name not in self.special_tokens:
            raise UserError(f"{name!r} is not a special token; there are {', '.join(self.special_tokens)}")
        return self.special_tokens[name]

    def get_bos_token_id(self) -> int:
        """The id of the token that starts every document; published vocabularies have <|endoftext|> instead."""
        return self.encode_special("<|bos|>" if "<|bos|>" in self.special_tokens else "<|endoftext|>")

    def id_to_bytes(self, id: int) -> bytes:
        """The bytes of a token, often part of a character. KeyError outside the vocabulary."""
        return self.encoding.decode_single_token_bytes(id)

    def id_to_token(self, id: int) -> str:
        """A token as text for display; incomplete characters become U+FFFD."""
        return self.id_to_bytes(id).decode("utf-8", errors="replace")

    def token_bytes(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Bytes of text per id: int32 of shape (vocab_size,), 0 for special tokens."""
        import torch

        lengths = [0] * self.get_vocab_size()
        for token, id in self.ranks.items():
            lengths[id] = len(token)
        return torch.tensor(lengths, dtype=torch.int32, device=device)

    def encode(
        self, text: str | Sequence[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each of a list of texts, between the special tokens `prepend` and `append` (ids or names)."""
        before, after = self._special_ids(prepend), self._special_ids(append)
        if isinstance(text, str):
            ids = []
            for segment in encodable_segments(text):
                ids += self.encoding.encode_ordinary(segment)
            return before + ids + after
        ids, offsets = self.encode_to_numpy(text, num_threads)
        return [before + ids[start:end].tolist() + after for start, end in pairwise(offsets)]

    __call__ = encode

    def _special_ids(self, token: int | str | None) -> list[int]:
        if isinstance(token, str):
            token = self.encode_special(token)
        return [] if token is None else [token]

    def encode_to_numpy(self, texts: Sequence[str], num_threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts concatenated, uint16 or uint32, and the offsets of the texts, int64 of shape (len(texts) + 1,)."""
        import numpy as np

        num_threads = min(num_threads, os.cpu_count() or 1)
        by_text = [list(encodable_segments(text)) for text in texts]
        segments = list(chain.from_iterable(by_text))
        if self._bulk_encoder:
            ids, offsets = self._bulk_encoder.encode_to_numpy(segments, num_threads)
        else:
            rows = self.encoding.encode_ordinary_batch(segments, num_threads=num_threads)
            ids, offsets = concatenate_ids(rows, max(self.ranks.values()))
        return ids, offsets[np.cumsum([0, *map(len, by_text)])]

    @cached_property
    def _bulk_encoder(self):
        """Our rustbpe with these ranks; None if the published package is installed, or if the pattern is not ours."""
        import rustbpe

        if not hasattr(rustbpe.Tokenizer, "encode_to_numpy"):
            print0("rustbpe is the published package, which is slow; with Rust, `bash dev/setup.sh` installs ours")
            return None
        return rustbpe.Tokenizer.from_ranks(self.ranks, self.pattern) if self.pattern == rustbpe.PATTERN else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. KeyError outside the vocabulary."""
        return self.encoding.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
        return render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict) -> list[int]:
        return render_for_completion(self, conversation)


class Segments:
    """The tokens of a reply as segments (kind, text) of whole characters: ("text", "It is "), ("python", "6*7"), ...

    The special tokens say of which kind the following tokens are; they are not shown. With `stop` strings the text
    ends before the first of them, and text that may become one is held back until it is known not to.
    """

    def __init__(self, tokenizer, stop: list[str] = ()):
        self.stop = stop
        self.stopped = False  # whether a stop string was found
        self._tokenizer = tokenizer
        self._kinds = dict.fromkeys(map(tokenizer.encode_special, tokenizer.get_special_tokens()), "text")
        self._kinds |= {tokenizer.encode_special(start): kind for kind, (start, _, _) in PARTS.items() if start}
        self._kind = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back incomplete characters
        self._held = ""

    def shows(self, token: int) -> bool:
        """Whether the token, the last one, is text of the assistant."""
        return self._kind == "text" and token not in self._kinds

    def push(self, token: int) -> list[tuple[str, str]]:
        if token not in self._kinds:
            return self._shown(self._utf8.decode(self._tokenizer.id_to_bytes(token)))
        segments = self._shown(self._utf8.decode(b"", final=True))
        self._kind = self._kinds[token]
        return segments

    def finish(self) -> list[tuple[str, str]]:
        """The held-back text at the end of the reply."""
        segments = self._shown(self._utf8.decode(b"", final=True))
        return [*segments, ("text", self._held)] if self._held else segments

    def _shown(self, text):
        if self.stopped:
            return []
        if self.stop and self._kind == "text":
            text = self._before_stop(self._held + text)
        return [(self._kind, text)] if text else []

    def _before_stop(self, text):
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def tokenizer_dir() -> Path:
    return get_base_dir() / "tokenizer"


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer of `scripts.tok_train`. Raises UserError if there is none yet."""
    return RustBPETokenizer.from_directory(tokenizer_dir())


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """`token_bytes` of `get_tokenizer()`."""
    return get_tokenizer().token_bytes(device)


def check_vocabulary(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """Raise ValueError unless every byte has a token, ranks are 0, 1, 2, ... and special ids differ from them."""
    if b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("some of the 256 bytes have no token, or a token has no bytes")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ids of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    ids = list(special_tokens.values())
    if not all(type(id) is int and len(ranks) <= id <= MAX_VOCAB_SIZE for id in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"special tokens share ids with others, or have ids above {MAX_VOCAB_SIZE:,}")


def _checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def encodable_segments(text: str) -> Iterator[str]:
    """The text, nearly always whole, in segments without a run of whitespace longer than MAX_BLANKS.

    Surrogate pairs are joined and lone surrogates become U+FFFD, as in tiktoken.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    start = 0
    if len(text) > MAX_BLANKS:
        for blanks in re.finditer(r"\s{1,%d}" % MAX_BLANKS, text):
            if len(blanks.group()) == MAX_BLANKS:
                yield text[start : blanks.end()]
                start = blanks.end()
    if start < len(text):
        yield text[start:]


def concatenate_ids(rows: list[list[int]], largest_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts in the form of `encode_to_numpy`: [[1, 2], [3]] -> ([1, 2, 3], [0, 2, 3])."""
    import numpy as np

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    dtype = np.uint16 if largest_id < 2**16 else np.uint32
    return np.fromiter((id for ids in rows for id in ids), dtype, offsets[-1]), offsets
