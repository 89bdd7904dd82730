"""Where pretraining text comes from: shards on disk, and how they get there.

The one idea to know: a source is a folder of parquet files ("shards") with one `text` column,
read a row group (about 1,000 documents) at a time. The last shard in order of name is the
validation split, the others are the training split. Nothing here knows of tokens or batches.

    python -m nanochat.dataset -n 8             # 8 training shards of the default source, and the last
    python -m nanochat.dataset --source sample  # the built-in corpus, no network needed
"""

from __future__ import annotations

import argparse
import shutil
import threading
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Iterator

from nanochat.common import UserError, get_base_dir, hub_endpoint, print0, run_script

# Source -> (data set on the hub, number of its last shard). https://huggingface.co/datasets/ID
SOURCES = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
}
SAMPLE = "sample"  # written by nanochat.sample_world, not fetched
DEFAULT_SOURCE = "climbmix"


# -----------------------------------------------------------------------------
# Shards on disk


def data_dir(source: str) -> Path:
    """The folder of a source: under the base folder for the named ones, else the folder that is named."""
    if source in SOURCES or source == SAMPLE:
        return get_base_dir() / "base_data" / source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--source {source!r} is neither one of {', '.join([*SOURCES, SAMPLE])} nor a folder. "
            "For data of your own, name a folder of parquet files with a `text` column."
        )
    return folder


def shard_paths(source: str = DEFAULT_SOURCE) -> list[Path]:
    """All shards of a source in order; the last one is the validation split.

    The sample corpus is written first where it is missing. Raises UserError where there is no shard.
    """
    folder = data_dir(source)
    if source == SAMPLE:
        _write_sample(folder)
    paths = sorted(folder.glob("*.parquet"))
    if not paths and source in SOURCES:
        raise UserError(
            f"no data of source {source} in {folder}. "
            f"Fetch some first: python -m nanochat.dataset -n 8 --source {source}"
        )
    if not paths:
        raise UserError(f"no .parquet files in {folder}. Two at least are needed: the last one is for validation")
    return paths


def split_paths(source: str, split: str) -> list[Path]:
    """The shards of split "train" (all but the last) or "val" (the last)."""
    assert split in ("train", "val"), f"split {split!r} is neither train nor val"
    paths = shard_paths(source)
    if split == "val":
        return paths[-1:]
    if len(paths) == 1:
        more = f": python -m nanochat.dataset -n 8 --source {source}" if source in SOURCES else " to the folder"
        raise UserError(
            f"{paths[0].parent} has only one shard, {paths[0].name}. The last shard is the validation split, "
            f"so there is nothing to train on. Add more{more}"
        )
    return paths[:-1]


def _write_sample(folder: Path) -> None:
    """Write the built-in corpus once; it appears whole or not at all, and only one process writes it."""
    from filelock import FileLock

    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        from nanochat.sample_world import write_shards

        print0(f"writing the built-in sample corpus to {folder}")
        unfinished = folder.with_name(folder.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_shards(unfinished)
        unfinished.rename(folder)


# -----------------------------------------------------------------------------
# Reading


def open_shard(path: Path):
    """The `pyarrow.parquet.ParquetFile` at `path`; UserError where it is damaged or holds no text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from error
    fields = {field.name: field.type for field in shard.schema_arrow}
    if "text" not in fields or not (pa.types.is_string(fields["text"]) or pa.types.is_large_string(fields["text"])):
        shard.close()
        raise UserError(f"{path} has no column `text` of strings; its columns: {', '.join(fields) or 'none'}")
    return shard


def row_counts(path: Path) -> list[int]:
    """How many rows each row group of a shard has."""
    with open_shard(path) as shard:
        return [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]


def count_documents(source: str, split: str) -> int:
    """How many documents a split has, those without text included."""
    return sum(sum(row_counts(path)) for path in split_paths(source, split))


def read_row_group(path: Path, group: int) -> list[str]:
    """The texts of one row group, one per row; a row without text is an empty string."""
    import pyarrow as pa

    with open_shard(path) as shard:
        try:
            table = shard.read_row_group(group, columns=["text"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is damaged in row group {group} ({str(error).splitlines()[0]}). Delete it and fetch it again."
            ) from error
    return [text or "" for text in table.column("text").to_pylist()]


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, source: str = DEFAULT_SOURCE
) -> Iterator[list[str]]:
    """One pass over a split, a list of documents per row group.

    Of each shard's row groups those numbered start, start + step, ... are read, so that ranks can
    share the work: start=rank, step=world size.
    """
    for path in split_paths(source, split):
        for group in range(start, len(row_counts(path)), step):
            texts = [text for text in read_row_group(path, group) if text]
            if texts:
                yield texts


def iter_documents(split: str, source: str = DEFAULT_SOURCE, start: int = 0, step: int = 1) -> Iterator[str]:
    """One pass over a split, document by document. `start` and `step` as in `parquets_iter_batched`."""
    for texts in parquets_iter_batched(split, start, step, source):
        yield from texts


# -----------------------------------------------------------------------------
# Fetching


def download_shards(source: str, num_train: int, workers: int = 4) -> list[Path]:
    """Fetch the first `num_train` shards of a source of the hub, and its last, the validation split.

    Shards that are there already are kept. Raises UserError for the first that cannot be fetched.
    """
    last = SOURCES[source][1]
    names = [f"shard_{number:05d}.parquet" for number in (last, *range(min(num_train, last)))]
    waiting, results = deque(names[1:]), SimpleQueue()
    results.put(_fetch(source, names[0]))  # alone, so that an unreachable hub is reported once and at once

    def work() -> None:
        while waiting:
            try:
                results.put(_fetch(source, waiting.popleft()))
            except IndexError:  # another worker took the last one
                return
            except (UserError, OSError) as error:
                waiting.clear()  # here, so that no worker begins another file
                results.put(error)

    for _ in range(min(workers, len(waiting))):
        threading.Thread(target=work, daemon=True).start()  # daemon: Ctrl-C ends the program at once
    for done in range(1, len(names) + 1):
        result = results.get()
        if isinstance(result, Exception):
            raise result
        print(f"{result.name}: {result.stat().st_size / 1e6:.1f} MB ({done} of {len(names)})", flush=True)
    return [data_dir(source) / name for name in names]


def _fetch(source: str, name: str) -> Path:
    from nanochat.download import download_file

    url = f"{hub_endpoint()}/datasets/{SOURCES[source][0]}/resolve/main/{name}"
    return download_file(url, data_dir(source) / name, check=open_shard)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Fetch pretraining text, and say what is there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-n", "--num-shards", type=int, default=8,
                        help="training shards to fetch, besides the last, which is for validation; -1 for all")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at the same time")
    parser.add_argument("--source", default=DEFAULT_SOURCE,
                        help=f"{', '.join([*SOURCES, SAMPLE])}, or a folder of parquet files")
    args = parser.parse_args(argv)
    if args.num_shards < -1 or args.num_workers < 1:
        raise UserError(f"-n must be -1 or more and -w 1 or more, not {args.num_shards} and {args.num_workers}")
    if args.source in SOURCES:
        num_train = args.num_shards if args.num_shards >= 0 else SOURCES[args.source][1]
        download_shards(args.source, num_train, args.num_workers)
    paths = shard_paths(args.source)
    for path in paths:
        open_shard(path).close()
    print(f"source {args.source}: {len(paths) - 1} training shards and validation shard {paths[-1].name} "
          f"in {data_dir(args.source)}")


if __name__ == "__main__":
    run_script(main)
