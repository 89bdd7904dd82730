"""The tokenizer's file: how a vocabulary is kept on disk and how we know that it is whole.

The one idea to know: a vocabulary is data, so its file must not be able to do anything. It is JSON
with the split pattern, the special tokens, the tokens in the order of their ids (base64, since most
are not text) and a checksum over all three. `tokenizer.pkl`, the older form of such a file, is a
pickle, which could run any program; it is read by an unpickler that can name a single class.

This file does not tokenize (tokenizer.py does).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
from pathlib import Path

from nanochat.common import UserError

VOCABULARY_FILE = "vocabulary.json"
LEGACY_FILE = "tokenizer.pkl"

Vocabulary = tuple[dict[bytes, int], str, dict[str, int]]  # ranks, pattern, special tokens


def check_vocabulary(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """ValueError unless every byte has a token, ranks count 0, 1, 2, ... and special ids are ids of their own."""
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("some of the 256 bytes have no token")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ids of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    ids = list(special_tokens.values())
    if not all(type(id) is int and len(ranks) <= id < 2**31 for id in ids) or len(set(ids)) < len(ids):
        raise ValueError("special tokens share ids with others")


def write_vocabulary(directory: Path, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> None:
    """Write the file; a reader finds the old one or the new one, never half of one."""
    tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
    body = {"pattern": pattern, "special_tokens": special_tokens, "tokens": tokens}
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{VOCABULARY_FILE}.{os.getpid()}"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"format": "nanochat-bpe-1", "sha256": checksum(body), **body}, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, directory / VOCABULARY_FILE)
    finally:
        aside.unlink(missing_ok=True)


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary in a folder, in our own form or else in the older one.

    Raises UserError when there is none or when it is damaged. Executes nothing that it reads.
    """
    for name, parse in ((VOCABULARY_FILE, parse_vocabulary), (LEGACY_FILE, parse_legacy_pickle)):
        path = directory / name
        if not path.is_file():
            continue
        try:
            ranks, pattern, special_tokens = parse(path.read_bytes())
            check_vocabulary(ranks, special_tokens)
            return ranks, pattern, special_tokens
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise UserError(
                f"the tokenizer in {path} cannot be used ({cause}); restore that file, or train a new "
                "tokenizer with `python -m scripts.tok_train`"
            ) from cause
    raise UserError(f"there is no tokenizer in {directory} yet; run `python -m scripts.tok_train` first")


def parse_vocabulary(data: bytes) -> Vocabulary:
    contents = json.loads(data)
    missing = {"sha256", "pattern", "special_tokens", "tokens"}.difference(contents)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    body = {name: contents[name] for name in ("pattern", "special_tokens", "tokens")}
    if contents["sha256"] != checksum(body):
        raise ValueError("its checksum does not match: it was damaged or edited")
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(body["tokens"])}
    return ranks, body["pattern"], body["special_tokens"]


def checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class PickledEncoding:
    """Stands in for tiktoken's Encoding while a legacy pickle is read: it keeps the state and does nothing."""

    def __setstate__(self, state):
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    """A pickle may call whatever it can name; this one can name nothing but tiktoken's Encoding."""

    def find_class(self, module: str, name: str):
        if name == "Encoding" and module in ("tiktoken", "tiktoken.core"):
            return PickledEncoding
        raise pickle.UnpicklingError(f"refused: it wants to run {module}.{name}")


def parse_legacy_pickle(data: bytes) -> Vocabulary:
    """The vocabulary of a pickled tiktoken Encoding; ValueError for anything else."""
    try:
        state = EncodingUnpickler(io.BytesIO(data)).load().state
    except Exception as cause:  # a damaged pickle can raise nearly anything
        raise ValueError(f"not a pickled tiktoken encoding: {cause}") from cause
    return state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
