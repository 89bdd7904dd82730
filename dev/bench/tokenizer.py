"""Speed of the tokenizer against its peers, on the same text in one run.

    python -m dev.bench.tokenizer                              # 50 MB, 1 and 2 threads
    python -m dev.bench.tokenizer --megabytes 5 --source sample

    ours            rustbpe as installed, from a list of str and from arrow
    rustbpe 0.1.0   the published package of the same name, kept in a folder of its own
    tiktoken        OpenAI's, which cannot train

Each measurement is a process of its own, and the contestants take turns, so that a busy neighbour slows all of them.
Times are the fastest of the repetitions, without loading the text. Vocabularies and ids must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.common import UserError, get_base_dir, run_script
from nanochat.tokenizer import SPLIT_PATTERN

PUBLISHED = "rustbpe==0.1.0"
CONTESTANTS = {"train": ("ours", "ours, arrow", "published"), "encode": ("ours", "ours, arrow", "published", "tiktoken")}


def contestant(job: dict) -> dict:
    """One measurement: {"seconds", "digest" of the merges or ids}."""
    import numpy as np
    import pyarrow as pa

    with pa.OSFile(job["corpus"]) as file:
        column = pa.ipc.open_file(file).read_all().column("text")
    texts = column if job["who"] == "ours, arrow" else column.to_pylist()
    threads = job["threads"]

    if job["who"] == "tiktoken":
        import tiktoken

        ranks = dict(pickle.loads(Path(job["vocabulary"]).read_bytes()))
        encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        work = lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)
    else:
        import rustbpe

        tokenizer, options = rustbpe.Tokenizer(), {} if job["who"] == "published" else {"threads": threads}
        train = lambda: tokenizer.train_from_iterator(texts.chunks if job["who"] == "ours, arrow" else texts, job["vocab"], pattern=SPLIT_PATTERN, **options)
        if job["what"] == "train":
            work = train
        elif job["who"] == "published":  # it can only encode with a vocabulary that it has trained itself
            train()
            work = lambda: tokenizer.batch_encode(texts)
        else:
            ours = rustbpe.Tokenizer.from_ranks(dict(pickle.loads(Path(job["vocabulary"]).read_bytes())), SPLIT_PATTERN)
            work = lambda: ours.encode_to_numpy(texts, threads=threads)

    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    if job["what"] == "train":
        merges = [(bytes(token), id) for token, id in tokenizer.get_mergeable_ranks()]
        if job["who"] == "ours":
            Path(job["vocabulary"]).write_bytes(pickle.dumps(merges))
        content = repr(merges).encode()
    else:
        ids = result[0].astype(np.uint32) if isinstance(result, tuple) else np.fromiter((id for row in result for id in row), np.uint32)
        content = ids.tobytes()
    return {"seconds": seconds, "digest": hashlib.sha256(content).hexdigest()}


def published_folder() -> Path | None:
    """The folder of the published package, downloaded once; None, with a line, if it cannot be had."""
    folder = get_base_dir() / "bench" / PUBLISHED.replace("==", "-")
    if not (folder / "rustbpe").is_dir():
        command = [sys.executable, "-m", "uv", "pip", "install", "-q", "-p", sys.executable, "--target", str(folder), "--no-deps", PUBLISHED]
        uv = subprocess.run(["uv", *command[3:]] if subprocess.run(["which", "uv"], capture_output=True).returncode == 0 else command, capture_output=True)
        if uv.returncode:
            print(f"without the published {PUBLISHED}, which could not be installed")
            return None
    return folder


def write_corpus(source: str, megabytes: float, path: Path) -> float:
    """Write the first megabytes of the training split as an arrow file; returns the millions of bytes."""
    import pyarrow as pa

    from nanochat.dataset import iter_documents

    texts, size = [], 0
    for text in iter_documents("train", source):
        if size >= megabytes * 1e6:
            break
        texts.append(text)
        size += len(text.encode())
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # chunks like the row groups of a shard
    return size / 1e6


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50, help="text, in millions of bytes of UTF-8")
    parser.add_argument("--vocab", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--source", default="climbmix", help="of the text, as in nanochat.dataset")
    parser.add_argument("--repeats", type=int, default=3, help="processes per contestant and setting")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # be one contestant: print a JSON object
    args = parser.parse_args(argv)
    if args.job:
        print(json.dumps(contestant(json.loads(args.job))))
        return

    import rustbpe

    if not hasattr(rustbpe, "Counts"):
        raise UserError("the published rustbpe is installed instead of ours: install Rust, then run `bash dev/setup.sh`")
    published, wrong = published_folder(), []
    with tempfile.TemporaryDirectory(prefix="nanochat_bench_") as folder:
        corpus, vocabulary = Path(folder) / "corpus.arrow", Path(folder) / "vocabulary.pickle"
        megabytes = write_corpus(args.source, args.megabytes, corpus)
        print(f"{megabytes:.1f} MB of {args.source}, vocabulary {args.vocab}, fastest of {args.repeats}")
        print(f"{'':8s}{'threads':>8s}  {'':14s}{'s':>8s}{'MB/s':>8s}{'x published':>12s}{'x tiktoken':>11s}  equal")
        for what, threads in [(what, threads) for what in CONTESTANTS for threads in (1, 2)]:
            results: dict[str, list] = {who: [] for who in CONTESTANTS[what] if who != "published" or published}
            for who in [*results] * args.repeats:
                job = {"what": what, "who": who, "threads": threads, "vocab": args.vocab, "corpus": str(corpus), "vocabulary": str(vocabulary)}
                env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
                if who == "published":
                    env["PYTHONPATH"] = os.pathsep.join([str(published), *filter(None, [os.environ.get("PYTHONPATH")])])
                command = [sys.executable, "-m", "dev.bench.tokenizer", "--job", json.dumps(job)]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{who} failed: {done.stderr.strip().splitlines()[-1]}")
                results[who].append(json.loads(done.stdout.splitlines()[-1]))
            best = {who: min(result["seconds"] for result in runs) for who, runs in results.items()}
            reference = results["tiktoken" if what == "encode" else "ours"][0]["digest"]
            for who, seconds in best.items():
                equal = all(result["digest"] == reference for result in results[who])
                wrong += [] if equal else [f"{who} ({what})"]
                ratios = [best[peer] / seconds if peer in best else float("nan") for peer in ("published", "tiktoken")]
                print(f"{what:8s}{threads:8d}  {who:14s}{seconds:8.2f}{megabytes / seconds:8.1f}{ratios[0]:12.2f}{ratios[1]:11.2f}  {equal}", flush=True)
    if wrong:
        sys.exit(f"not equal: {', '.join(wrong)}")


if __name__ == "__main__":
    run_script(main)
