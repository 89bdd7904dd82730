"""Shards: which there are, which is for validation, how they are read and fetched."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, download
from nanochat.common import UserError, run_script


def write_shard(path: Path, texts: list, row_group_size: int = 2, column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path) -> str:
    """Three shards of five documents, two of them for training."""
    for shard in range(3):
        write_shard(tmp_path / "mine" / f"{shard}.parquet", [f"{shard}:{row}" for row in range(5)])
    return str(tmp_path / "mine")


def test_the_last_shard_is_the_validation_split(folder):
    assert [p.name for p in dataset.split_paths(folder, "train")] == ["0.parquet", "1.parquet"]
    assert [p.name for p in dataset.split_paths(folder, "val")] == ["2.parquet"]
    assert list(dataset.iter_documents("train", folder)) == [f"{s}:{r}" for s in (0, 1) for r in range(5)]
    assert list(dataset.iter_documents("val", folder)) == [f"2:{r}" for r in range(5)]


def test_row_groups_are_the_batches_and_ranks_share_them(folder):
    assert list(dataset.parquets_iter_batched("val", source=folder)) == [["2:0", "2:1"], ["2:2", "2:3"], ["2:4"]]
    shares = [list(dataset.iter_documents("train", folder, start=rank, step=2)) for rank in range(2)]
    assert sorted(sum(shares, [])) == list(dataset.iter_documents("train", folder))
    assert shares[1] == ["0:2", "0:3", "1:2", "1:3"]


def test_rows_without_text_are_left_out_but_keep_their_number(tmp_path):
    write_shard(tmp_path / "0.parquet", ["a", None, "", "b"], row_group_size=4)
    assert dataset.read_row_group(tmp_path / "0.parquet", 0) == ["a", "", "", "b"]
    assert list(dataset.iter_documents("val", str(tmp_path))) == ["a", "b"]


# -----------------------------------------------------------------------------
# Mistakes of a person


def test_one_shard_leaves_nothing_to_train_on(tmp_path):
    write_shard(tmp_path / "0.parquet", ["a"])
    with pytest.raises(UserError, match="only one shard.*validation split, so there is nothing to train on"):
        dataset.split_paths(str(tmp_path), "train")
    assert len(dataset.split_paths(str(tmp_path), "val")) == 1


def test_no_data_yet_says_how_to_fetch_it(base_dir):
    with pytest.raises(UserError, match="python -m nanochat.dataset -n 8 --source fineweb-edu"):
        dataset.split_paths("fineweb-edu", "train")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: None, "no .parquet files"),
        (lambda folder: (folder / "0.parquet").write_text("<html>"), "0.parquet is not a readable parquet file"),
        (lambda folder: write_shard(folder / "0.parquet", ["a"], column="content"), "no column `text`.*content"),
        (lambda folder: write_shard(folder / "0.parquet", [1, 2]), "no column `text` of strings"),
    ],
)
def test_a_folder_that_is_no_corpus_is_named(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        list(dataset.iter_documents("val", str(tmp_path)))


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "0.parquet"
    write_shard(path, ["some text that takes a page " * 50])
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page's header
    path.write_bytes(data)
    with pytest.raises(UserError, match="0.parquet is damaged in row group 0"):
        list(dataset.iter_documents("val", str(tmp_path)))


def test_a_source_that_does_not_exist_lists_those_that_do(base_dir):
    with pytest.raises(UserError, match="climbmix, fineweb-edu, sample nor a folder"):
        dataset.shard_paths("climbmixx")


# -----------------------------------------------------------------------------
# The sample corpus


def test_the_sample_corpus_is_written_once_and_whole(base_dir, monkeypatch):
    calls = []

    def write_shards(directory):
        calls.append(directory)
        if len(calls) == 1:
            write_shard(Path(directory) / "shard_00000.parquet", ["half"])
            raise KeyboardInterrupt
        for shard in range(2):
            write_shard(Path(directory) / f"shard_{shard:05d}.parquet", [str(shard)])

    stand_in = types.SimpleNamespace(write_shards=write_shards)
    monkeypatch.setitem(sys.modules, "nanochat.sample_world", stand_in)
    with pytest.raises(KeyboardInterrupt):
        dataset.shard_paths("sample")
    for _ in range(2):
        assert list(dataset.iter_documents("train", "sample")) == ["0"]
        assert list(dataset.iter_documents("val", "sample")) == ["1"]
    assert len(calls) == 2


# -----------------------------------------------------------------------------
# Fetching from the hub


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree for the stand-in hub with three small shards."""
    for shard in range(3):
        name = f"datasets/karpathy/fineweb-edu-100b-shuffle/shard_{shard:05d}.parquet"
        write_shard(tmp_path / "root" / name, [f"{shard}:{row} " + "text " * 400 for row in range(50)])
    return tmp_path / "root"


@pytest.mark.parametrize("source, last", [("climbmix", "shard_06542"), ("fineweb-edu", "shard_01822")])
def test_n_training_shards_and_the_last_are_fetched(start_hub, tree, base_dir, monkeypatch, capsys, source, last):
    monkeypatch.setenv("HF_ENDPOINT", start_hub(root=tree))
    dataset.main(["-n", "2", "--source", source])
    assert "2 training shards and validation shard" in capsys.readouterr().out
    names = [p.stem for p in dataset.shard_paths(source)]
    assert names == ["shard_00000", "shard_00001", last]
    assert next(dataset.iter_documents("val", source)).startswith("2:0 ")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    dataset.main(["-n", "2", "--source", source])  # all there: nothing is asked of the hub


def test_every_fault_at_once(start_hub, tree, base_dir, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    faults = "--fail-first 1 --truncate-first 2 --corrupt-first 1 --slow 400000".split()
    monkeypatch.setenv("HF_ENDPOINT", start_hub(*faults, root=tree))
    dataset.main(["-n", "3", "-w", "2"])
    for path in dataset.shard_paths("climbmix")[:-1]:
        assert path.read_bytes() == (tree / "datasets/karpathy/fineweb-edu-100b-shuffle" / path.name).read_bytes()


def test_a_shard_that_the_hub_lacks_stops_the_rest(start_hub, tree, base_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", start_hub(root=tree))
    with pytest.raises(UserError, match="shard_00003.parquet: the server answered 404"):
        dataset.main(["-n", "-1", "-w", "1"])
    assert not list((base_dir / "base_data").glob("*/shard_00004*"))


def test_a_hub_that_is_down_is_one_line_and_exit_code_1(base_dir, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: dataset.main(["-n", "1"]))
    assert exit.value.code.startswith("error: cannot fetch shard_06542.parquet from http://127.0.0.1:1/")
    assert "\n" not in exit.value.code


def test_the_real_stand_in_hub(hub, base_dir):
    dataset.main(["-n", "1"])
    train, val = (next(dataset.iter_documents(split)) for split in ("train", "val"))
    assert train and val and train != val


@pytest.mark.parametrize("flags", [["-n", "-2"], ["-w", "0"]])
def test_numbers_that_make_no_sense(base_dir, flags):
    with pytest.raises(UserError, match="-n must be -1 or more and -w 1 or more"):
        dataset.main(flags)
