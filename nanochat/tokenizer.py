"""Byte-level BPE tokenizer: train, encode, decode, save, load.

The one idea to know: a tokenizer is three pieces of plain data. `pattern` splits text into words,
`ranks` (bytes -> id, in the order in which the merges were learnt) says which neighbours inside a
word are joined first, `special_tokens` (name -> id) are control tokens that no text can produce.
rustbpe learns the ranks and encodes text in bulk, tiktoken encodes single prompts, and both agree
token for token. Where no Rust was at hand the published package called rustbpe is installed, which
only learns; then tiktoken does the rest.

This file does not know what a conversation looks like (conversation.py does) and normalises nothing:
`decode(encode(text)) == text`, but for half a surrogate pair, which no UTF-8 can hold and which
becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer  # the built-in one only from Python 3.11 on
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, Sequence

from nanochat.common import UserError, get_base_dir
from nanochat.conversation import render_conversation, render_for_completion
from nanochat.vocabulary import read_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import numpy as np
    import torch

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",  # ... and this is what it answers
    "<|output_end|>",
]

# GPT-4's pattern, but numbers are grouped by at most 2 digits, not 3: a small vocabulary has
# better uses for its places than the 1,000 three-digit numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)

# `\s+(?!\S)` needs a stack as deep as the run of blanks is long, and tiktoken's regex engine gives up at a
# million and panics (the published rustbpe then skips the text). Runs are cut well before that, for all alike.
MAX_BLANKS = 100_000
PRETRAINED_PATIENCE = 15.0  # seconds in which a published vocabulary (under 3 MB) must arrive


class RustBPETokenizer:
    """Text to token ids and back. Safe to share between threads."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]):
        import tiktoken

        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        self._bytes = {id: token for token, id in ranks.items()}
        self._bytes.update((id, name.encode()) for name, id in special_tokens.items())

    # -------------------------------------------------------------------------
    # Where tokenizers come from

    @classmethod
    def train_from_iterator(cls, iterator: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """Learn `vocab_size` tokens from texts: 256 bytes, then merges, then the special tokens.

        Raises UserError when the texts hold too few different words for so many tokens.
        """
        if isinstance(iterator, str):
            raise TypeError("train_from_iterator takes an iterator of texts, not one text")
        num_special = len(SPECIAL_TOKENS)
        if vocab_size < 256 + num_special:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and {num_special} special tokens "
                f"make {256 + num_special}; ask for more"
            )
        import rustbpe

        learner = rustbpe.Tokenizer()
        pieces = (piece for text in iterator for piece in encodable_pieces(text))
        learner.train_from_iterator(pieces, vocab_size - num_special, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
        if len(ranks) + num_special < vocab_size:
            raise UserError(
                f"this text supports a vocabulary of at most {len(ranks) + num_special} tokens, not {vocab_size} "
                "(every word in it is one token by then); train on more text or ask for a smaller vocabulary"
            )
        return cls(ranks, SPLIT_PATTERN, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_directory(cls, directory: str | Path) -> RustBPETokenizer:
        """The tokenizer that `save` left in a folder. Raises UserError when there is none or it is damaged."""
        return cls(*read_vocabulary(Path(directory)))

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> RustBPETokenizer:
        """A published vocabulary that tiktoken knows: "gpt2", "cl100k_base" (GPT-4), ...

        tiktoken keeps it on disk after the first time. Raises UserError where it is out of reach.
        """
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

        if tiktoken_name not in ENCODING_CONSTRUCTORS:
            raise UserError(f"no published vocabulary {tiktoken_name!r}; there are {', '.join(ENCODING_CONSTRUCTORS)}")
        try:
            parts = call_within(PRETRAINED_PATIENCE, ENCODING_CONSTRUCTORS[tiktoken_name])
        except (OSError, ValueError, NoAnswer) as cause:  # every network error of requests is an OSError
            raise UserError(
                f"the vocabulary {tiktoken_name!r} is out of reach: tiktoken could not fetch it "
                f"({type(cause).__name__}); connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from cause
        return cls(parts["mergeable_ranks"], parts["pat_str"], parts["special_tokens"])

    def save(self, directory: str | Path) -> None:
        """Write the vocabulary into a folder as plain data (see vocabulary.py)."""
        write_vocabulary(Path(directory), self.ranks, self.pattern, self.special_tokens)

    # -------------------------------------------------------------------------
    # The vocabulary

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def fingerprint(self) -> str:
        """A checksum of tokens and their ids: models are kept together with the tokenizer that they were trained with."""
        tokens = sorted(self.ranks, key=self.ranks.get)
        return hashlib.sha256(repr((tokens, self.pattern, sorted(self.special_tokens.items()))).encode()).hexdigest()

    def get_special_tokens(self) -> set[str]:
        return set(self.special_tokens)

    def encode_special(self, name: str) -> int:
        """The id of a special token: `encode_special("<|bos|>")`."""
        if name not in self.special_tokens:
            raise ValueError(f"{name!r} is no special token; there are {', '.join(self.special_tokens)}")
        return self.special_tokens[name]

    def get_bos_token_id(self) -> int:
        """The token every document begins with; published vocabularies have <|endoftext|> in its place."""
        return self.encode_special("<|bos|>" if "<|bos|>" in self.special_tokens else "<|endoftext|>")

    def id_to_bytes(self, id: int) -> bytes:
        """The bytes a token stands for, perhaps only part of a character. KeyError outside the vocabulary."""
        return self._bytes[id]

    def id_to_token(self, id: int) -> str:
        """A token as text to look at; bytes that are no whole character show as U+FFFD."""
        return self.id_to_bytes(id).decode("utf-8", errors="replace")

    def token_byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens, which are not text."""
        lengths = [0] * self.get_vocab_size()
        for token, id in self.ranks.items():
            lengths[id] = len(token)
        return lengths

    # -------------------------------------------------------------------------
    # Text to ids

    def encode(
        self,
        text: str | Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or a list of ids for each of a list of texts.

        `prepend` and `append` are special tokens (id or name) to put around each text. Special tokens
        written out in the text itself stay text.
        """
        before, after = self._special_ids(prepend), self._special_ids(append)
        if isinstance(text, str):
            return before + self._encode_text(text) + after
        if not isinstance(text, (list, tuple)):
            raise TypeError(f"encode takes a str or a list of str, not {type(text).__name__}")
        ids, offsets = self.encode_to_numpy(text, num_threads)
        return [before + ids[start:end].tolist() + after for start, end in zip(offsets[:-1], offsets[1:])]

    __call__ = encode

    def encode_to_numpy(self, texts: Sequence[str], num_threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, uint16 or uint32, and where each text's begin: int64 of shape (len(texts) + 1,)."""
        import numpy as np

        num_threads = max(1, min(num_threads, os.cpu_count() or 1))
        if max(map(len, texts), default=0) <= MAX_BLANKS:
            try:
                return self._encode_pieces(texts, num_threads)
            except UnicodeEncodeError:
                pass  # half a surrogate pair in one of them
        pieces = [list(encodable_pieces(text)) for text in texts]
        ids, offsets = self._encode_pieces(list(chain.from_iterable(pieces)), num_threads)
        return ids, offsets[np.cumsum([0, *map(len, pieces)])]

    def _encode_pieces(self, texts: Sequence[str], num_threads: int) -> tuple[np.ndarray, np.ndarray]:
        if self._bulk_encoder:
            return self._bulk_encoder.encode_to_numpy(texts, num_threads)
        rows = self.encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        return end_to_end(rows, max(self.ranks.values()))

    @cached_property
    def _bulk_encoder(self):
        """Our rustbpe with these ranks; None where the published package is installed, or for a pattern that it
        would have to split with another regex engine than tiktoken's."""
        import rustbpe

        if not hasattr(rustbpe.Tokenizer, "encode_to_numpy") or not rustbpe.is_known(self.pattern):
            return None
        return rustbpe.Tokenizer.from_ranks(self.ranks, self.pattern)

    def _special_ids(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [self.encode_special(token) if isinstance(token, str) else token]

    def _encode_text(self, text: str) -> list[int]:
        if len(text) <= MAX_BLANKS:  # nearly always: spare the copy
            return self.encoding.encode_ordinary(text)
        return [id for piece in encodable_pieces(text) for id in self.encoding.encode_ordinary(piece)]

    # -------------------------------------------------------------------------
    # Ids to text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. KeyError outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
        return render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict) -> list[int]:
        return render_for_completion(self, conversation)

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """The tokens for a terminal, separated by |: green where the assistant learns to say them, else red."""
        green, red, plain = "\033[92m", "\033[91m", "\033[0m"
        return "|".join(
            f"{green if learnt else red}{self.id_to_token(id)}{plain}" for id, learnt in zip(ids, mask, strict=True)
        )


class StreamDecoder:
    """Decodes ids one at a time without ever cutting a character.

    The strings it gives, joined, equal `tokenizer.decode` of all ids: "é" split over two tokens
    comes out as "" and then "é".
    """

    def __init__(self, tokenizer: RustBPETokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with this token."""
        return self._decoder.decode(self._tokenizer.id_to_bytes(token_id))

    def finish(self) -> str:
        """What was begun and can no longer be completed, as U+FFFD; "" where nothing was."""
        return self._decoder.decode(b"", final=True)


def tokenizer_dir() -> Path:
    return get_base_dir() / "tokenizer"


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer that `scripts.tok_train` made. Raises UserError where there is none yet."""
    return RustBPETokenizer.from_directory(tokenizer_dir())


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """Bytes of text per token id of `get_tokenizer()`: int32 of shape (vocab_size,), 0 for special tokens."""
    import torch

    return torch.tensor(get_tokenizer().token_byte_lengths(), dtype=torch.int32, device=device)


# -----------------------------------------------------------------------------
# Text that both libraries can take


def encodable_pieces(text: str) -> Iterator[str]:
    """The text as pieces of sound UTF-8 in which no run of blanks is longer than MAX_BLANKS.

    Nearly always the one piece is the text itself. Surrogate pairs are joined and lone halves become
    U+FFFD, which is what tiktoken does of its own accord and rustbpe refuses to.
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


def end_to_end(rows: list[list[int]], largest_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts as `encode_to_numpy` gives them: [[1, 2], [3]] -> ([1, 2, 3], [0, 2, 3])."""
    import numpy as np

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    dtype = np.uint16 if largest_id < 2**16 else np.uint32
    return np.fromiter((id for ids in rows for id in ids), dtype, offsets[-1]), offsets


def call_within(seconds: float, function: Callable):
    """`function()`, or TimeoutError after so many seconds: requests waits minutes for a silent network."""
    answer: Future = Future()

    def work():
        try:
            answer.set_result(function())
        except Exception as error:  # whatever it is, it is raised where the answer is awaited
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result(timeout=seconds)
