"""How fast text becomes batches, and what rules of packing cost.

    python -m dev.bench.loader --source climbmix             # the real loader, and a loader as usual
    python -m dev.bench.loader --source climbmix --policies  # rules of packing, played through on the lengths of real text

Needs text and a tokenizer (`python -m scripts.tok_train` writes one). The loader as usual keeps Python
lists, looks through all documents that wait for the largest that fits, crops the shortest, and works while
the device waits. In the table of rules:
    discarded    tokens that no row ever shows, % of those read
    bos          tokens that are the bos of a document's second piece, third, ..., % of all
    mid          tokens in such pieces, %
    cuts         per document, and how many more than there must be at that T
    context      tokens that stand before a token in its piece, on average
"""

from __future__ import annotations

import argparse
import time
from itertools import chain, islice

from nanochat.common import run_script

RULES = {  # what opens a row, fills it, is cut when nothing fits; the shortest rest that is kept
    "crop the shortest": ("oldest", "largest", "shortest", None),
    "largest opens, crop the shortest": ("longest", "largest", "shortest", None),
    "crop the oldest": ("oldest", "largest", "oldest", None),
    "fill exactly, crop the shortest": ("oldest", "best", "shortest", None),
    "cut the oldest": ("oldest", "largest", "oldest", 1),
    "cut the longest": ("oldest", "largest", "longest", 1),
    "cut the shortest": ("oldest", "largest", "shortest", 1),
    "cut the shortest, drop rests under 32": ("oldest", "largest", "shortest", 32),
    "fill exactly, cut the longest": ("oldest", "best", "longest", 1),
    "largest opens, fill exactly": ("longest", "best", "shortest", 1),
    "fill exactly, cut the shortest *": ("oldest", "best", "shortest", 1),  # * what the loader does
}


def play(lengths: list[int], T: int, buffer_size: int, opens: str, fills: str, cuts: str, least: int | None) -> dict:
    """What one rule makes of documents of these lengths, bos included, once the buffer has been emptied a few times."""
    from nanochat.packing import BestFitBuffer

    buffer = BestFitBuffer(T + 1)
    pop = {
        "oldest": buffer.pop_oldest, "shortest": buffer.pop_shortest, "longest": lambda: buffer.pop_largest(T + 2),
        "largest": buffer.pop_largest, "best": buffer.pop_best,
    }  # fmt: skip
    documents, at_a_time = iter(lengths), 1 if buffer_size == 1 else 128
    read, rows, total = 0, 0, sum(lengths)
    lost, seen, mid, again, context, ended, made, needed = [0] * 8  # after the warm-up
    began = time.perf_counter()
    while True:
        counts = read > total / 3 or read == total
        room = T + 1
        while room > 1:
            if len(buffer) < buffer_size:
                for length in islice(documents, at_a_time):
                    buffer.add(length, (length, length - 1, 0))
                    read += length
            if not buffer:
                break
            length, left, cut = pop[opens]() if room > T else pop[fills](room) or pop[cuts]()
            used = min(left, room - 1)
            room -= used + 1
            rest = left - used
            keep = least is not None and rest >= least
            if keep:
                buffer.add(rest + 1, (length, rest, cut + 1))
            if counts:
                seen, mid, again, context = seen + used, mid + used * (cut > 0), again + (cut > 0), context + used * used / 2
                if not keep:
                    lost, ended, made, needed = lost + rest, ended + 1, made + cut + (rest > 0), needed + (length - 2) // T
        rows += 1
        if read == total and len(buffer) < buffer_size:
            break
    percent = 100 / max(seen + lost, 1)
    return {
        "discarded": lost * percent, "bos": again * percent, "mid": mid * percent, "cuts": made / ended,
        "more": (made - needed) / ended, "context": context / seen, "rate": rows * T / (time.perf_counter() - began),
    }  # fmt: skip


def compare_rules(tokenizer, groups, count: int) -> None:
    texts = (text for group in groups for text in group if text)
    lengths = []
    while some := list(islice(texts, min(1024, count - len(lengths)))):
        _, offsets = tokenizer.encode_to_numpy(some)
        lengths += [1 + b - a for a, b in zip(offsets.tolist(), offsets[1:].tolist())]
    print(f"{len(lengths)} documents, {sum(lengths) / len(lengths):.0f} tokens on average, the longest {max(lengths)}")
    for T in (512, 2048):
        print(f"\nT = {T}: {100 * sum(n > T + 1 for n in lengths) / len(lengths):.1f}% of documents are longer than a row, "
              f"{100 * sum(max(0, n - T - 1) for n in lengths) / sum(lengths):.1f}% of tokens are beyond it")
        print(f"{'buffer':>6}  {'rule':38}{'discarded':>10}{'bos':>8}{'mid':>7}{'cuts':>7}{'more':>7}{'context':>9}{'M tok/s':>9}")
        for buffer_size in (1, 32, 128, 512, 1000, 4000):
            for name, rule in RULES.items():
                r = play(lengths, T, buffer_size, *rule)
                print(f"{buffer_size:6d}  {name:38}{r['discarded']:9.2f}%{r['bos']:7.3f}%{r['mid']:6.1f}%{r['cuts']:7.3f}{r['more']:7.3f}"
                      f"{r['context']:9.1f}{r['rate'] / 1e6:9.0f}", flush=True)


class Timed:
    """A tokenizer that counts the time it takes, and likewise that of `read`."""

    def __init__(self, tokenizer, read):
        self.tokenizer, self._read = tokenizer, read
        self.seconds = {"reading": 0.0, "tokenizing": 0.0}

    def get_bos_token_id(self):
        return self.tokenizer.get_bos_token_id()

    def encode_to_numpy(self, texts, num_threads):
        return self._timed("tokenizing", self.tokenizer.encode_to_numpy, texts, num_threads=num_threads)

    def read(self, path, group):
        return self._timed("reading", self._read, path, group)

    def _timed(self, what, function, *args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[what] += time.perf_counter() - began
        return result


def loader_as_usual(tokenizer, groups, B: int, T: int, lost: list[int]):
    """Batches like ours, made plainly; `lost` collects how many tokens are thrown away."""
    import torch

    bos, buffer = tokenizer.get_bos_token_id(), []
    texts = (text for group in groups for text in group if text)
    while True:
        rows = torch.empty(B, T + 1, dtype=torch.long)
        for row in rows:
            at = 0
            while at < T + 1:
                while len(buffer) < 1000:
                    buffer += tokenizer.encode(list(islice(texts, 128)), prepend=bos, num_threads=4)
                room = T + 1 - at
                fitting = [(len(ids), i) for i, ids in enumerate(buffer) if len(ids) <= room]
                _, best = max(fitting) if fitting else min((len(ids), i) for i, ids in enumerate(buffer))
                ids = buffer.pop(best)
                lost.append(max(0, len(ids) - room))
                row[at : at + len(ids[:room])] = torch.tensor(ids[:room])
                at += len(ids[:room])
        yield rows[:, :-1].int(), rows[:, 1:].clone(), None


def pace(batches, seconds: float, warm=lambda: None) -> list[float]:
    """The time each batch took, after a warm-up of a second, when `warm` is called."""
    began = time.perf_counter()
    while time.perf_counter() < began + 1:
        next(batches)
    warm()
    times, now = [], time.perf_counter()
    while sum(times) < seconds:
        next(batches)
        now, last = time.perf_counter(), now
        times.append(now - last)
    batches.close()
    return times


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Time the pretraining loader; compare rules of packing.", formatter_class=formatter)
    parser.add_argument("--source", default="climbmix", help="climbmix, fineweb-edu, sample or a folder")
    parser.add_argument("--B", type=int, default=32, help="rows of a batch")
    parser.add_argument("--T", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=4, help="threads that tokenize")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each loader runs")
    parser.add_argument("--policies", action="store_true", help="compare rules of packing instead")
    parser.add_argument("--documents", type=int, default=30000, help="documents to compare them on")
    args = parser.parse_args(argv)

    import torch

    from nanochat import lanes
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as ours
    from nanochat.dataset import parquets_iter_batched
    from nanochat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer()
    if args.policies:
        return compare_rules(tokenizer, parquets_iter_batched("train", source=args.source), args.documents)

    def show(name, times, notes):
        tokens, (middle, tail) = args.B * args.T, (sorted(times)[int(share * len(times))] for share in (0.5, 0.99))
        print(f"{name:16}{tokens * len(times) / sum(times) / 1e6:7.2f} M tok/s, ms per batch p50 {1000 * middle:.2f} "
              f"p99 {1000 * tail:.2f}; {notes}", flush=True)

    timed = Timed(tokenizer, lanes.read_row_group)
    lanes.read_row_group = timed.read
    batches = ours(timed, args.B, args.T, "train", args.threads, device="cpu", source=args.source, rank=0, world_size=1)
    times = pace(batches, args.seconds, lambda: timed.seconds.update(reading=0.0, tokenizing=0.0))
    elapsed = sum(times)
    rows, began = torch.zeros(args.B, args.T + 1, dtype=torch.int32), time.perf_counter()
    for _ in range(20):
        rows[:, :-1].clone(), rows[:, 1:].long()
    tensors = (time.perf_counter() - began) / 20 * len(times)
    shares = {**timed.seconds, "tensors": tensors, "packing": elapsed - sum(timed.seconds.values()) - tensors}
    show("ours", times, "0% discarded; time: " + ", ".join(f"{name} {100 * s / elapsed:.0f}%" for name, s in shares.items()))

    groups = chain.from_iterable(parquets_iter_batched("train", source=args.source) for _ in range(1000))
    lost: list[int] = []
    times = pace(loader_as_usual(tokenizer, groups, args.B, args.T, lost), args.seconds, lost.clear)
    used = args.B * args.T * len(times)
    show("as usual", times, f"{100 * sum(lost) / (used + sum(lost)):.1f}% discarded")


if __name__ == "__main__":
    run_script(main)
