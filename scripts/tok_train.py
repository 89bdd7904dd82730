"""Train the tokenizer on the first documents of the training split.

    python -m scripts.tok_train
    python -m scripts.tok_train --source sample --vocab-size 8192

Merges are learned from word counts, so variety matters: at most --doc-cap characters are taken from a
document. A model works only with the tokenizer that it was trained with, which its checkpoints carry.
"""

import time
from typing import Iterable, Iterator

from nanochat import flags
from nanochat.common import ranks, run_script

ROUND_TRIP = """Hello, world! It's 31 °C; 12345 + 6,789 = 19134.
\tdef f(x):\r\n        return {"naïve": x ** 2}   # trailing blanks  \n\n\n
한국어 문장, 日本語の文, русский, العربية, 👩‍🚀 and <|bos|> as text."""


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--max-chars", type=flags.number(float, 1, 1e15), default=2_000_000_000, help="characters to train on, at most")
    parser.add_argument("--doc-cap", type=flags.COUNT, default=10_000, help="characters per document, at most")
    parser.add_argument("--vocab-size", type=flags.COUNT, default=32_768, help="number of tokens, special tokens included")
    parser.add_argument("--source", default="climbmix", help=flags.SOURCES)
    args = parser.parse_args(argv)
    if ranks()[0] > 0:
        return  # under torchrun the main rank does all the work

    from nanochat import report
    from nanochat.dataset import iter_documents
    from nanochat.tokenizer import RustBPETokenizer, tokenizer_dir

    print(f"training a tokenizer of {args.vocab_size} tokens on {args.source}", flush=True)
    start = time.monotonic()
    read = {"documents": 0, "characters": 0}
    texts = capped(iter_documents("train", source=args.source), args.doc_cap, int(args.max_chars), read)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, args.vocab_size)
    seconds = time.monotonic() - start

    tokenizer.save(tokenizer_dir())
    tokenizer = RustBPETokenizer.from_directory(tokenizer_dir())  # as later stages load it
    assert tokenizer.decode(tokenizer.encode(ROUND_TRIP)) == ROUND_TRIP, "encoding and decoding changed the text"

    lengths = [length for length in tokenizer.token_bytes().tolist() if length]
    report.log("Tokenizer training", {
        "source": args.source,
        "vocabulary": tokenizer.get_vocab_size(),
        "special tokens": len(tokenizer.get_special_tokens()),
        **read,
        "training seconds": round(seconds, 1),
        "mean bytes per token": round(sum(lengths) / len(lengths), 2),
        "longest token in bytes": max(lengths),
    })
    print(f"trained in {seconds:.1f} s on {read['characters']:,} characters of {read['documents']:,} documents; "
          f"saved to {tokenizer_dir()}")


def capped(documents: Iterable[str], doc_cap: int, max_chars: int, read: dict[str, int]) -> Iterator[str]:
    """Truncated documents, `max_chars` characters in all, with a progress bar; `read` counts documents and characters."""
    from tqdm import tqdm

    with tqdm(desc="reading", unit=" chars", unit_scale=True, disable=None) as bar:  # in a terminal only
        for text in documents:
            text = text[: min(doc_cap, max_chars - read["characters"])]
            read["documents"] += 1
            read["characters"] += len(text)
            bar.update(len(text))
            yield text
            if read["characters"] >= max_chars:
                break
    print(f"read {read['characters']:,} characters; now merging", flush=True)


if __name__ == "__main__":
    run_script(main)
