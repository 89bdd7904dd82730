"""Train the tokenizer on the first documents of the training split.

    python -m scripts.tok_train
    python -m scripts.tok_train --source sample --vocab-size 8192

The one idea to know: merges are learned from counts of words, so it is variety that matters and no
document may dominate: each gives at most --doc-cap characters. The model, its data files and every
checkpoint depend on the vocabulary made here; a new one needs a new model.
"""

from __future__ import annotations

import argparse
import time
from typing import Iterable, Iterator

from nanochat.common import UserError, ranks, run_script

ROUND_TRIP = """Hello, world! It's 31 °C; 12345 + 6,789 = 19134.
\tdef f(x):\r\n        return {"naïve": x ** 2}   # trailing blanks  \n\n\n
한국어 문장, 日本語の文, русский, العربية, 👩‍🚀 and <|bos|> as text."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train the tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--max-chars", type=whole_number, default=2_000_000_000, help="characters to train on at most")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters taken from one document at most")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="tokens to learn, special tokens included")
    parser.add_argument("--source", default="climbmix", help="climbmix, fineweb-edu, sample or a folder")
    args = parser.parse_args(argv)
    if ranks()[0] > 0:
        return  # under torchrun the main rank does all of it
    if args.max_chars < 1 or args.doc_cap < 1:
        raise UserError("--max-chars and --doc-cap must be at least 1")

    from nanochat import report
    from nanochat.dataset import iter_documents
    from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir

    print(f"training a tokenizer of {args.vocab_size} tokens on {args.source}", flush=True)
    start = time.monotonic()
    read = {"documents": 0, "characters": 0}
    texts = capped(iter_documents("train", source=args.source), args.doc_cap, args.max_chars, read)
    tokenizer = RustBPETokenizer.train_from_iterator(with_progress(texts, read), args.vocab_size)
    seconds = time.monotonic() - start

    tokenizer.save(tokenizer_dir())
    tokenizer = RustBPETokenizer.from_directory(tokenizer_dir())  # what later stages will see
    assert tokenizer.decode(tokenizer.encode(ROUND_TRIP)) == ROUND_TRIP, "encoding and decoding changed the text"

    lengths = [length for length in tokenizer.token_bytes().tolist() if length]
    results = {
        "source": args.source,
        "vocabulary": tokenizer.get_vocab_size(),
        "special tokens": len(tokenizer.get_special_tokens()),
        **read,
        "training seconds": round(seconds, 1),
        "mean bytes per token": round(sum(lengths) / len(lengths), 2),
        "longest token in bytes": max(lengths),
    }
    report.log("Tokenizer training", results)
    print(
        f"trained in {seconds:.1f} s on {read['characters']:,} characters of {read['documents']:,} documents; "
        f"saved to {tokenizer_dir()}"
    )


def whole_number(text: str) -> int:
    """2000000000 may also be written 2e9 or 2_000_000_000."""
    return int(float(text))


def capped(documents: Iterable[str], doc_cap: int, max_chars: int, read: dict[str, int]) -> Iterator[str]:
    """The beginnings of documents until there are `max_chars` characters; `read` counts along."""
    for text in documents:
        text = text[: min(doc_cap, max_chars - read["characters"])]
        read["documents"] += 1
        read["characters"] += len(text)
        yield text
        if read["characters"] >= max_chars:
            return


def with_progress(texts: Iterable[str], read: dict[str, int]) -> Iterator[str]:
    """The same texts, with a bar in a terminal while they are read and a line when they are."""
    from tqdm import tqdm

    with tqdm(desc="reading", unit=" chars", unit_scale=True, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text))
    print(f"read {read['characters']:,} characters; now merging", flush=True)


if __name__ == "__main__":
    run_script(main)
