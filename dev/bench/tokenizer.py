"""Speed and memory of the tokenizer against its peers, on the same text in one run.

    python -m dev.bench.tokenizer                              # 50 MB, vocabularies of 32768 and 65536, 1 and 2 threads
    python -m dev.bench.tokenizer --megabytes 5 --only encode

    ours            rustbpe as it is installed, from a list of str, from arrow, and counting and merging apart
    rustbpe 0.1.0   the published package of the same name, kept in a folder of its own
    tokenizers      Hugging Face's
    tiktoken        OpenAI's, which cannot train

Every number comes from processes of their own, one per contestant, setting and repetition, and the contestants take
turns, so that a busy neighbour slows all of them. Times are the fastest, memory is the largest of the repetitions.
Memory is the high-water mark above what the process held once the text was loaded, results included. Loading the text
and importing are not timed. "x peer" is the time of the fastest peer with as many threads, divided by this one's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.common import UserError, get_base_dir, run_script
from nanochat.tokenizer import SPLIT_PATTERN

TRAINERS = ("ours", "ours, arrow", "ours, apart", "rustbpe 0.1.0", "tokenizers")
ENCODERS = ("ours", "ours, arrow", "ours, lists", "rustbpe 0.1.0", "tokenizers", "tiktoken")
ENCODE_VOCAB = 32768
BAD_CASES = ("one letter", "latin-1 bytes", "emoji", "blanks", "random letters")
PUBLISHED = "rustbpe==0.1.0"


# -----------------------------------------------------------------------------
# In the contestant's process


def measured(work):
    """(what `work` returns, its seconds and its peak of memory in MiB above what there was before)."""
    import ctypes
    import gc

    gc.collect()
    before = None
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what loading the text left behind would hide the first MiB
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
        before = high_water()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return result, {"seconds": seconds, "mib": high_water() - before if before is not None else float("nan")}


def high_water() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def load(job: dict):
    """The documents as this contestant wants them: a chunked array, or a list of str."""
    import pyarrow as pa

    with pa.OSFile(job["corpus"]) as file:
        column = pa.ipc.open_file(file).read_all().column("text")
    if job["who"].endswith("arrow"):
        return column
    texts = column.to_pylist()
    del column
    pa.default_memory_pool().release_unused()
    return texts


def hub_tokenizer(ranks: dict[bytes, int] | None = None):
    """Hugging Face's tokenizer with our pattern; with our vocabulary too where one is given."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    model = BPE()
    if ranks is not None:
        # It writes byte b as the character number b where that can be seen, else as one of those from 256 on.
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in seen]
        letter = {**{b: chr(b) for b in seen}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}
        name = lambda token: "".join(letter[b] for b in token)
        merges = [tuple(map(name, halves(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        model = BPE({name(token): id for token, id in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    split = Split(Regex(SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into this one: {ab: 256, abc: 257} makes abc of (ab, c)."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 2**31))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def train(job: dict) -> dict:
    texts, who, vocab, threads = load(job), job["who"], job["vocab"], job["threads"]
    phases = {}
    if who == "tokenizers":
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer

        learner = hub_tokenizer()
        trainer = BpeTrainer(vocab_size=vocab, show_progress=False, initial_alphabet=ByteLevel.alphabet())
        _, result = measured(lambda: learner.train_from_iterator(texts, trainer))
        return {**result, "tokens": learner.get_vocab_size()}

    import rustbpe

    learner = rustbpe.Tokenizer()

    def work():
        if who == "rustbpe 0.1.0":
            learner.train_from_iterator(texts, vocab, pattern=SPLIT_PATTERN)
        elif who == "ours, apart":
            started = time.perf_counter()
            counts = rustbpe.Counts(SPLIT_PATTERN)
            counts.add(texts, threads=threads)
            phases["counting"] = time.perf_counter() - started
            learner.train_from_counts(counts, vocab)
            phases["merging"] = time.perf_counter() - started - phases["counting"]
        else:
            items = texts.chunks if who == "ours, arrow" else texts
            learner.train_from_iterator(items, vocab, pattern=SPLIT_PATTERN, threads=threads)

    _, result = measured(work)
    tokens = [(bytes(token), id) for token, id in learner.get_mergeable_ranks()]
    if job.get("save"):
        Path(job["save"]).write_bytes(pickle.dumps(tokens))
    return {**result, **phases, "tokens": len(tokens), "digest": hashlib.sha256(repr(tokens).encode()).hexdigest()}


def encode(job: dict) -> dict:
    import numpy as np

    texts, threads = load(job), job["threads"]
    work, flat = encoder(job, texts)
    work(texts[:20])  # starts the threads
    rows, result = measured(lambda: work(texts))
    ids = flat(rows)
    if job.get("save"):
        np.save(job["save"], ids)
    return {**result, "threads": threads, "tokens": len(ids), "digest": hashlib.sha256(ids.tobytes()).hexdigest()}


def encoder(job: dict, texts):
    """(what turns texts to ids, what makes one uint32 array of its result)."""
    import numpy as np

    who, threads = job["who"], job["threads"]
    joined = lambda rows: np.fromiter((id for row in rows for id in row), np.uint32)
    if who == "rustbpe 0.1.0":  # it can only encode what it has learnt itself
        import rustbpe

        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(texts, ENCODE_VOCAB, pattern=SPLIT_PATTERN)
        return learner.batch_encode, joined
    ranks = dict(pickle.loads(Path(job["vocabulary"]).read_bytes()))
    if who == "tiktoken":
        encoding = tiktoken_encoding(ranks)
        if threads == 1:
            return lambda texts: [encoding.encode_ordinary(text) for text in texts], joined
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads), joined
    if who == "tokenizers":
        tokenizer = hub_tokenizer(ranks)
        return lambda texts: tokenizer.encode_batch_fast(texts), lambda rows: joined(row.ids for row in rows)
    import rustbpe

    ours = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
    if who == "ours, lists":  # on all cores, or on one
        return (lambda texts: [ours.encode(text) for text in texts]) if threads == 1 else ours.batch_encode, joined
    return lambda texts: ours.encode_to_numpy(texts, threads=threads), lambda result: result[0].astype(np.uint32)


def tiktoken_encoding(ranks: dict[bytes, int]):
    import tiktoken

    return tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def bad_text(case: str, size: int) -> str:
    """About `size` bytes of UTF-8 on which careless code is quadratic."""
    rng = random.Random(0)
    if case == "one letter":
        return "a" * size
    if case == "latin-1 bytes":
        return rng.randbytes(size * 2 // 3).decode("latin-1")  # half of them take two bytes
    if case == "emoji":
        return "".join(chr(rng.randrange(0x1F600, 0x1F650)) for _ in range(size // 4))
    if case == "blanks":
        return " " * size
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size))


def bad(job: dict) -> dict:
    text, ranks = bad_text(job["case"], job["size"]), dict(pickle.loads(Path(job["vocabulary"]).read_bytes()))
    if job["who"] == "tiktoken":
        work = tiktoken_encoding(ranks).encode_ordinary
    else:
        import rustbpe

        work = rustbpe.Tokenizer.from_ranks(ranks, SPLIT_PATTERN).encode
    ids, result = measured(lambda: work(text))
    return {**result, "digest": hashlib.sha256(repr(ids).encode()).hexdigest()}


def floor(job: dict) -> dict:
    """What this machine can do, and what splitting and counting alone reach, on one thread."""
    import numpy as np

    import rustbpe

    def rate(work, size: float) -> float:
        return size / min(measured(work)[1]["seconds"] for _ in range(5))

    memory, texts = np.ones(2**25), load(job)  # 256 MiB, far more than any cache
    size = sum(len(text.encode()) for text in texts)
    result = {"read GB/s": rate(memory.sum, memory.nbytes / 1e9), "copy GB/s": rate(memory.copy, memory.nbytes / 1e9)}
    result["splitting MB/s"] = rate(lambda: [rustbpe.word_ends(text, SPLIT_PATTERN) for text in texts], size / 1e6)
    result["counting MB/s"] = rate(lambda: rustbpe.Counts(SPLIT_PATTERN).add(texts, threads=1), size / 1e6)
    return result


# -----------------------------------------------------------------------------
# Starting them, and the tables


class Bench:
    def __init__(self, args, folder: Path):
        self.args, self.folder, self.failed = args, folder, False
        self.published = published_folder()
        self.job = {"corpus": str(folder / "corpus.arrow"), "vocabulary": str(folder / "vocabulary.pickle")}

    def run(self, what: str, who: str, threads: int = 1, timeout: float | None = None, **more) -> dict | None:
        """The result of one process; None where it failed or took too long, which is told."""
        job = {**self.job, "what": what, "who": who, "threads": threads, **more}
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        if who == "rustbpe 0.1.0":
            env["PYTHONPATH"] = os.pathsep.join([str(self.published), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "dev.bench.tokenizer", "--job", json.dumps(job)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"seconds": float("inf")}
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            print(f"{who} failed ({what}, {threads} threads): {reason[:200]}", flush=True)
            self.failed |= who.startswith("ours")
            return None
        result = json.loads(done.stdout.splitlines()[-1])
        if self.args.json:
            with open(self.args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps({**job, **result, "megabytes": self.megabytes}) + "\n")
        return result

    def alternate(self, what: str, contestants, **settings) -> dict[str, dict]:
        """{contestant: its fastest time, largest memory and all else}, of those that did not fail."""
        seen = {who: [] for who in contestants if who != "rustbpe 0.1.0" or self.published}
        for repeat in range(self.args.repeats):
            for who, results in list(seen.items()):
                save = {} if repeat else {"save": str(self.folder / f"{what} {who}.npy")}
                result = self.run(what, who, **settings, **save)
                if result is None:
                    del seen[who]
                else:
                    results.append(result)
        return {who: {**min(all, key=lambda r: r["seconds"]), "mib": max(r["mib"] for r in all)} for who, all in seen.items()}

    def training(self) -> None:
        print(f"\ntraining; fastest of {self.args.repeats}, largest memory of {self.args.repeats}")
        print(f"{'vocabulary':>10s} {'threads':>7s}  {'':14s}{'s':>8s}{'MB/s':>8s}{'counting':>9s}{'merging':>8s}{'x peer':>8s}{'MiB':>8s}{'tokens':>8s}")
        for vocab in self.args.vocab_sizes:
            digests = set()
            for threads in self.args.threads:
                results = self.alternate("train", TRAINERS, vocab=vocab, threads=threads)
                peer = fastest_peer(results)
                for who, r in results.items():
                    phases = "".join(f"{r[p]:{w}.2f}" if p in r else " " * w for p, w in (("counting", 9), ("merging", 8)))
                    print(f"{vocab:10d} {threads:7d}  {who:14s}{r['seconds']:8.2f}{self.megabytes / r['seconds']:8.1f}{phases}"
                          f"{peer / r['seconds']:8.2f}{r['mib']:8.0f}{r['tokens']:8d}", flush=True)
                digests |= {r["digest"] for who, r in results.items() if who.startswith("ours")}
            if len(digests) > 1:
                print(f"WRONG: ours learnt {len(digests)} different vocabularies of {vocab} from the same text")
                self.failed = True
            self.compare_merges()

    def compare_merges(self) -> None:
        saved = [self.folder / f"train {who}.npy" for who in ("ours", "rustbpe 0.1.0")]
        if not all(path.exists() for path in saved):
            return
        ours, theirs = (pickle.loads(path.read_bytes()) for path in saved)
        differ = [(a, b) for a, b in zip(ours, theirs) if a != b]
        known = {token for token, _ in theirs}
        alone = sum(token not in known for token, _ in ours)
        line = f"merges: ours {len(ours) - 256}, published {len(theirs) - 256}, {len(differ)} ids differ, {alone} tokens only in ours"
        print(line + (f"; first difference: ours {differ[0][0]}, published {differ[0][1]}" if differ else ""), flush=True)
        self.failed |= bool(differ) or len(ours) != len(theirs)

    def learn(self) -> bool:
        """The vocabulary of all encoders, from ours."""
        learnt = self.run("train", "ours", threads=max(self.args.threads), vocab=ENCODE_VOCAB, save=self.job["vocabulary"])
        return learnt is not None

    def encoding(self) -> None:
        print(f"\nencoding, vocabulary {ENCODE_VOCAB}; fastest of {self.args.repeats}, largest memory of {self.args.repeats}")
        print(f"{'threads':>7s}  {'':14s}{'s':>8s}{'MB/s':>8s}{'x peer':>8s}{'MiB':>8s}{'tokens':>10s}  ids as tiktoken's")
        for threads in self.args.threads:
            results = self.alternate("encode", ENCODERS, threads=threads)
            peer, truth = fastest_peer(results), results.get("tiktoken", {}).get("digest")
            for who, r in results.items():
                same = "" if truth is None else "yes" if r["digest"] == truth else f"NO, from number {self.first_difference(who)} on"
                print(f"{threads:7d}  {who:14s}{r['seconds']:8.2f}{self.megabytes / r['seconds']:8.1f}{peer / r['seconds']:8.2f}"
                      f"{r['mib']:8.0f}{r['tokens']:10d}  {same}", flush=True)
                self.failed |= who.startswith("ours") and same.startswith("NO")

    def first_difference(self, who: str) -> int:
        import numpy as np

        a, b = (np.load(self.folder / f"encode {name}.npy") for name in (who, "tiktoken"))
        size = min(len(a), len(b))
        return int(np.argmax(np.append(a[:size] != b[:size], True)))

    def bad_cases(self) -> None:
        print(f"\none bad text, seconds; fastest of {self.args.repeats}; linear is a ratio of 4; inf: more than {self.args.timeout} s")
        print(f"{'':16s}{'ours 1 MB':>10s}{'4 MB':>9s}{'ratio':>7s}{'tiktoken 1 MB':>15s}{'4 MB':>9s}{'ratio':>7s}  same ids")
        for case in BAD_CASES:
            seen = {}  # (contestant, size) -> the fastest result, or None
            for repeat in range(self.args.repeats):
                for who, size in ((who, size) for size in (10**6, 4 * 10**6) for who in ("ours", "tiktoken")):
                    before = seen.get((who, size), {"seconds": float("inf")} if repeat == 0 else None)
                    hopeless = repeat > 0 and (before is None or before["seconds"] == float("inf"))
                    if not hopeless:
                        result = self.run("bad", who, timeout=self.args.timeout, case=case, size=size)
                        seen[who, size] = min(result, before, key=lambda r: r["seconds"]) if result else None
            row = f"{case:16s}"
            for who, width in (("ours", 10), ("tiktoken", 15)):
                small, large = (seen[who, size]["seconds"] if seen[who, size] else float("nan") for size in (10**6, 4 * 10**6))
                row += f"{small:{width}.3f}{large:9.3f}{large / small:7.1f}"
            digests = [[seen[who, size].get("digest") if seen[who, size] else None for who in ("ours", "tiktoken")] for size in (10**6, 4 * 10**6)]
            whole = [pair for pair in digests if None not in pair]
            print(row + "  " + ("-" if not whole else "yes" if all(a == b for a, b in whole) else "NO"), flush=True)
            self.failed |= any(a != b for a, b in whole)


def fastest_peer(results: dict[str, dict]) -> float:
    return min((r["seconds"] for who, r in results.items() if not who.startswith("ours")), default=float("nan"))


def published_folder() -> Path | None:
    """Where the published package of our name lies; fetched once. None, and a line about it, where it cannot be had."""
    folder = get_base_dir() / "bench" / PUBLISHED.replace("==", "-")
    if not (folder / "rustbpe").is_dir():
        command = ["uv", "pip", "install", "-q", "-p", sys.executable, "--target", str(folder), "--no-deps", PUBLISHED]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            reason = (done.stderr.strip().splitlines() or [""])[0] if done.returncode else None
        except FileNotFoundError:
            reason = "there is no uv"
        if reason is not None:
            print(f"going on without the published {PUBLISHED}, which could not be installed: {reason}")
            return None
    return folder


def write_corpus(args, path: Path) -> tuple[int, int]:
    """The first megabytes of the training split as an arrow file; (documents, bytes). UserError where there are too few."""
    import pyarrow as pa

    from nanochat.dataset import iter_documents

    texts, size = [], 0
    for text in iter_documents("train", args.source):
        if size >= args.megabytes * 1e6:
            break
        texts.append(text)
        size += len(text.encode())
    else:
        if size < args.megabytes * 1e6:
            raise UserError(f"the training shards of {args.source} hold {size / 1e6:.1f} MB, not {args.megabytes:g}; fetch more "
                            f"(python -m nanochat.dataset -n 7) or ask for --megabytes {int(size / 1e6)}")
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # chunks of about the size of a parquet file's
    return len(texts), size


def main(argv=None):
    def numbers(text):
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description="The tokenizer against its peers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50, help="text, in millions of bytes of UTF-8")
    parser.add_argument("--vocab-sizes", type=numbers, default=[32768, 65536], help="to train, separated by commas")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="numbers of threads, separated by commas")
    parser.add_argument("--source", default="climbmix", help="of the text, as in nanochat.dataset")
    parser.add_argument("--only", choices=["train", "encode"], help="one half of the tables")
    parser.add_argument("--repeats", type=int, default=3, help="processes per contestant and setting")
    parser.add_argument("--timeout", type=float, default=30, help="seconds that one bad text may take")
    parser.add_argument("--json", default="", help="append every process's result to this file, a JSON object per line")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # be one contestant: print a JSON object
    args = parser.parse_args(argv)
    if args.job:
        job = json.loads(args.job)
        print(json.dumps({"train": train, "encode": encode, "bad": bad, "floor": floor}[job["what"]](job)))
        return

    import rustbpe

    if not hasattr(rustbpe, "Counts"):
        raise UserError("our rustbpe is not installed, but the published one: install Rust, then run `bash dev/setup.sh`")
    with tempfile.TemporaryDirectory(prefix="nanochat_bench_") as folder:
        documents, size = write_corpus(args, Path(folder) / "corpus.arrow")
        bench = Bench(args, Path(folder))
        bench.megabytes = size / 1e6
        print(f"{documents} documents of {args.source}, {bench.megabytes:.1f} MB, {os.cpu_count()} cores")
        if machine := bench.run("floor", "ours"):
            print("this machine, one thread: " + ", ".join(f"{name} {value:.1f}" for name, value in machine.items()), flush=True)
        if args.only != "encode":
            bench.training()
        if args.only != "train" and bench.learn():
            bench.encoding()
            bench.bad_cases()
    if bench.failed:
        sys.exit("\nFAILED: see above")


if __name__ == "__main__":
    run_script(main)
