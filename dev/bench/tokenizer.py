"""Speed of our rustbpe against the published package of that name and tiktoken, on the same text in one run.

    python -m dev.bench.tokenizer                                # 50 MB of climbmix
    python -m dev.bench.tokenizer --source sample --megabytes 5

    ours       trains and encodes
    published  rustbpe 0.1.0, installed once into a folder of its own; it can only encode with what it has trained itself
    tiktoken   encodes with our vocabulary; it cannot train

Each measurement is a process of its own, and the contestants take turns, so that a busy neighbour slows all of them.
Times are the fastest of the repetitions, without loading text. "x best peer" compares with the fastest of the others at as many
threads. "same": the merges are the published package's, the ids tiktoken's; if not, the exit code is 1.
"""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time

from nanochat import flags
from nanochat.common import UserError, get_base_dir, run_script
from nanochat.dataset import iter_documents
from nanochat.tokenizer import SPLIT_PATTERN

PUBLISHED = "rustbpe==0.1.0"


def texts_of(source: str, megabytes: float) -> list[str]:
    """The first documents of the training split, so many megabytes of them."""
    texts, size = [], 0
    for text in iter_documents("train", source):
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            return texts
    raise UserError(f"the training shards of {source} hold only {size / 1e6:.1f} MB; fetch more, or ask for fewer --megabytes")


def measure(args, who: str, task: str, threads: int, published: str | None, ranks: list | None) -> tuple:
    """(seconds, merges or a hash of the ids) of one contestant; called in a new process."""
    if who == "published":
        sys.path.insert(0, published)
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    import numpy as np
    import tiktoken

    import rustbpe

    texts, tokenizer = texts_of(args.source, args.megabytes), rustbpe.Tokenizer()
    options = {} if who == "published" else {"threads": threads}

    def train():
        tokenizer.train_from_iterator(texts, args.vocab_size, pattern=SPLIT_PATTERN, **options)
        return tokenizer.get_mergeable_ranks()

    if task == "train":
        work = train
    elif who == "published":
        train()
        work = lambda: tokenizer.batch_encode(texts)
    elif who == "tiktoken":
        encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        work = lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)
    else:
        ours = rustbpe.Tokenizer.from_ranks(dict(ranks), SPLIT_PATTERN)
        work = lambda: [ours.encode_to_numpy(texts, threads=threads)[0]]
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    if task == "train":
        return seconds, [(bytes(token), id) for token, id in result]
    ids = np.concatenate([np.asarray(row, np.uint32) for row in result])
    return seconds, hashlib.sha256(ids).hexdigest()


def published_package() -> str | None:
    """The folder of the published package; None, with a line that says why, where it cannot be installed."""
    folder = get_base_dir() / "bench" / PUBLISHED.replace("==", "-")
    if not (folder / "rustbpe").is_dir():
        command = ["uv", "pip", "install", "-q", "-p", sys.executable, "--target", str(folder), "--no-deps", PUBLISHED]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"without the published {PUBLISHED}, which could not be installed: {getattr(error, 'stderr', None) or error}")
            return None
    return str(folder)


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--megabytes", type=flags.number(float, 0.001), default=50, help="size of the text")
    parser.add_argument("--source", default="climbmix", help="source of the text, as in nanochat.dataset")
    parser.add_argument("--vocab-size", type=flags.COUNT, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--threads", type=flags.COUNT, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--repeats", type=flags.COUNT, default=3, help="processes per contestant and setting")
    args = parser.parse_args(argv)

    import rustbpe

    if not hasattr(rustbpe, "PATTERN"):
        raise UserError("the published rustbpe is installed, not ours: install Rust, then run `bash dev/setup.sh`")
    published, ranks, mismatch = published_package(), None, False
    print(f"{args.megabytes:g} MB of {args.source}; vocabulary {args.vocab_size}; {os.cpu_count()} cores")
    print(f"{'':8s}{'threads':>8s}  {'':12s}{'s':>8s}{'MB/s':>8s}{'x best peer':>13s}{'same':>6s}")
    for task, reference in (("train", "published"), ("encode", "tiktoken")):
        contestants = ["ours", *["published"] * bool(published), *["tiktoken"] * (task == "encode")]
        for threads in args.threads:
            results = {who: [] for who in contestants}
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                for who in contestants * args.repeats:
                    results[who].append(pool.apply(measure, (args, who, task, threads, published, ranks)))
            seconds = {who: min(seconds for seconds, _ in runs) for who, runs in results.items()}
            peer = min((seconds[who] for who in contestants if who != "ours"), default=float("nan"))
            _, expected = results.get(reference, results["ours"])[0]
            for who, runs in results.items():
                same = all(outcome == expected for _, outcome in runs)
                mismatch |= not same
                print(f"{task:8s}{threads:8d}  {who:12s}{seconds[who]:8.2f}{args.megabytes / seconds[who]:8.1f}"
                      f"{peer / seconds[who]:13.2f}{'yes' if same else 'NO':>6s}", flush=True)
        if task == "train":
            ranks = results["ours"][0][1]
    if mismatch:
        sys.exit("FAILED: merges or ids differ, see above")


if __name__ == "__main__":
    run_script(main)
