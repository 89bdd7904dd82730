"""Shards: which there are, which is for validation, how they are read and downloaded."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import plain_files

from nanochat import dataset, sample_world
from nanochat.common import UserError
from nanochat.dataset import fetch_file


def write_shard(path: Path, texts: list, row_group_size: int = 2, column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)


def test_the_last_shard_is_the_validation_split_and_rows_without_text_are_skipped(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.parquet", [f"{shard}:{row}" for row in range(5)] + [None, ""])
    folder = str(tmp_path)
    assert list(dataset.iter_documents("train", folder)) == [f"{s}:{r}" for s in (0, 1) for r in range(5)]
    assert list(dataset.iter_documents("val", folder)) == [f"2:{r}" for r in range(5)]
    assert dataset.count_rows([tmp_path / "0.parquet"]) == {"0.parquet": 7}


def damage_first_page(path: Path) -> None:
    write_shard(path, ["some text that takes a page " * 50])
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the header of the page
    path.write_bytes(data)


@pytest.mark.parametrize(
    "write, split, message",
    [
        (lambda path: None, "val", "has 0 .parquet files; at least 2 are needed.* add more"),
        (lambda path: write_shard(path, ["a"]), "train", "has 1 .parquet files; at least 2 are needed"),
        (lambda path: path.write_text("<html>"), "val", "0.parquet is not a readable parquet file"),
        (lambda path: write_shard(path, ["a"], column="content"), "val", "no column `text`.*content"),
        (lambda path: write_shard(path, [1, 2]), "val", "no column `text` of strings"),
        (damage_first_page, "val", "0.parquet is not a readable parquet file"),
        (lambda path: write_shard(path, pa.nulls(2)), "val", "no column `text` of strings"),
        (lambda path: write_shard(path, pa.array([b"a", b"\xff"]).view(pa.string())), "val", "can't decode byte 0xff"),
        (lambda path: pq.write_table(pa.table([["a"], ["b"]], ["text"] * 2), path), "val", "0.parquet is not .*exists 2 times"),
    ],
)
def test_a_folder_without_usable_shards_is_refused(tmp_path, write, split, message):
    write(tmp_path / "0.parquet")
    with pytest.raises(UserError, match=message):
        list(dataset.iter_documents(split, str(tmp_path)))


def test_a_source_without_data_is_refused_with_the_remedy(base_dir):
    with pytest.raises(UserError, match="climbmix, fineweb-edu, sample nor a folder"):
        dataset.main(["--source", "climbmixx"])
    with pytest.raises(UserError, match="python -m nanochat.dataset -n 8 --source fineweb-edu"):
        dataset.split_paths("fineweb-edu", "train")


def test_the_sample_corpus_is_written_once(base_dir, monkeypatch):
    def write_shards(folder):
        for number in range(2):
            write_shard(folder / f"{number}.parquet", [str(number)])

    for split, text, function in (("train", "0", write_shards), ("val", "1", None)):
        monkeypatch.setattr(sample_world, "write_shards", function)
        assert list(dataset.iter_documents(split, "sample")) == [text]


# -----------------------------------------------------------------------------
# Downloads


def test_n_training_shards_and_the_last_are_downloaded_once(hub, base_dir, monkeypatch, capsys):
    dataset.main(["-n", "2"])
    output = capsys.readouterr()
    assert "2 training shards with 120 documents and validation shard shard_06542.parquet" in output.out
    assert "3/3" in output.err and "shard/s" in output.err
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert [p.name for split in ("train", "val") for p in dataset.split_paths("climbmix", split)] == names
    assert next(dataset.iter_documents("val", "climbmix")).startswith("Document 2.0: ")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    dataset.main(["-n", "2"])  # all shards exist, so the hub is not needed
    with pytest.raises(UserError, match="cannot download shards of climbmix: nothing answers at http://127.0.0.1:1."):
        dataset.main(["-n", "3"])


def test_a_damaged_shard_is_named_and_downloaded_again_once_it_is_deleted(hub, base_dir):
    hub.faults["shard_00001"] = ["corrupt"]
    with pytest.raises(UserError, match="shard_00001.parquet is not a readable .* delete it and run"):
        dataset.main(["-n", "2"])
    (base_dir / "base_data" / "climbmix" / "shard_00001.parquet").unlink()
    dataset.main(["-n", "2"])


def test_a_missing_shard_stops_the_rest(hub, base_dir):
    with pytest.raises(UserError, match="cannot download shards of karpathy/climbmix.*404.*shard_00003"):
        dataset.main(["-n", "-1", "-w", "1"])
    assert len(hub.requests) == 4  # the validation shard and the three that exist


NAME = "words_alpha.txt"
CONTENT = plain_files()[NAME]


@pytest.fixture
def url(hub, monkeypatch):
    monkeypatch.setattr(dataset, "WAITS", (0, 0, 0))
    return f"{os.environ['NANOCHAT_FILES_URL']}/{NAME}"


def names_in(folder):
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("faults", [[], [503], ["cut"], ["cut", 429]], ids=str)
def test_a_file_is_complete_despite_faults_of_the_server(hub, url, tmp_path, faults):
    hub.faults[NAME] = list(faults)
    path = fetch_file(url, tmp_path / "here" / NAME)
    assert path.read_bytes() == CONTENT and len(hub.requests) == len(faults) + 1
    fetch_file("http://127.0.0.1:1/x", path)  # an existing file is kept
    assert names_in(path.parent) == [NAME]


@pytest.mark.parametrize(
    "faults, message, requests",
    [
        ([404], f"cannot download {NAME} from .*HTTP Error 404: Not Found", 1),  # final, not tried again
        ([503] * 3, "HTTP Error 503", 3),
        (["cut"] * 3, f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes", 3),
        ([], f"{NAME} is larger than 100 bytes", 1),
    ],
    ids=str,
)
def test_a_failed_download_names_the_file_and_the_cause_and_leaves_nothing(hub, url, tmp_path, faults, message, requests):
    hub.faults[NAME] = faults
    with pytest.raises(UserError, match=message):
        fetch_file(url, tmp_path / NAME, max_bytes=2**20 if faults else 100)
    assert len(hub.requests) == requests and names_in(tmp_path) == []


def test_a_silent_server_times_out(url, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections and never answers
        with pytest.raises(UserError, match="data.zip.*timed out"):
            fetch_file(f"http://127.0.0.1:{listener.getsockname()[1]}/data.zip", tmp_path / "data.zip")


def test_concurrent_calls_download_a_file_once(hub, url, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fetch_file, [url] * 3, [tmp_path / NAME] * 3))
    assert (tmp_path / NAME).read_bytes() == CONTENT and len(hub.requests) == 1
