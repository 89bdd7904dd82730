"""Shards: which there are, which is for validation, how they are read, prepared from own text, and downloaded."""

import io
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_shard
from fake_hub import plain_files
from hypothesis import given, strategies as st

from nanochat import dataset, sample_world
from nanochat.common import UserError
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as loader
from nanochat.dataset import fetch_file, iter_documents, split_paths
from nanochat.tokenizer import RustBPETokenizer


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


@pytest.mark.parametrize("write, message", [
    (lambda path: path.write_text("<html>"), "0.parquet is not a readable parquet file"),
    (lambda path: write_shard(path, ["a"], column="content"), "no column `text`.*content"),
    (lambda path: write_shard(path, [1, 2]), "no column `text` of strings"),
    (damage_first_page, "0.parquet is not a readable parquet file"),
    (lambda path: write_shard(path, pa.nulls(2)), "no column `text` of strings"),
    (lambda path: write_shard(path, pa.array([b"a", b"\xff"]).view(pa.string())), "can't decode byte 0xff"),
    (lambda path: pq.write_table(pa.table([["a"], ["b"]], ["text"] * 2), path), "0.parquet is not .*exists 2 times"),
])  # fmt: skip
def test_a_file_that_is_no_shard_is_refused(base_dir, tmp_path, write, message):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "0.parquet")
    with pytest.raises(UserError, match=f"at least 2 documents are needed.*{message}"):
        list(iter_documents("train", str(source)))  # a single file is prepared
    write_shard(source / "1.parquet", ["a"])
    with pytest.raises(UserError, match=message):
        list(iter_documents("train", str(source)))  # several are used as they are


def test_a_source_without_data_is_refused_with_the_remedy(base_dir):
    for source in ("climbmixx", ""):
        with pytest.raises(UserError, match="climbmix, fineweb-edu, sample nor a file or folder of .txt"):
            dataset.main(["--source", source])
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
# Own text


def notes(count: int) -> str:
    """`count` paragraphs of two lines, all different."""
    return "\n".join(f"Note {i} is about the number {i * i}.\nIt says {'so ' * (i % 7)}that {i} is {i}.\n" for i in range(count))


def splits(source: Path) -> tuple[list[str], list[str]]:
    return tuple(list(iter_documents(split, str(source))) for split in ("train", "val"))


def test_files_of_every_kind_become_documents_and_what_is_left_out_is_listed(base_dir, tmp_path, capsys):
    source = tmp_path / "source"
    for folder in ("sub", ".hidden", "sub/deeper"):
        (source / folder).mkdir(parents=True)
    files = {
        "a.txt": b"\xef\xbb\xbfFirst\r\nnote\r\n\r\nend\r\n", "sub/deeper/b.MD": "# Käthe\n".encode(), "copy.txt": b"First\nnote\n\nend",
        "empty.txt": b"", "latin.txt": "Käthe".encode("latin-1"), "utf16.txt": "Hello".encode("utf-16"), "image.png": b"x",
        ".hidden/c.txt": b"hidden", "damaged.parquet": b"<html>",
        "lines.jsonl": b'{"text": " kept as it is "}\n\n{"txt": "a"}\nno JSON\n{"text": 5}\n["text"]\n{"text": "\\ud800"}\n',
    }  # fmt: skip
    for name, data in files.items():
        (source / name).write_bytes(data)
    write_shard(source / "sub" / "table.parquet", ["row one", None, "row two"])
    (source / "loop").symlink_to(source)
    (source / "gone.txt").symlink_to(source / "nothing.txt")
    os.mkfifo(source / "pipe.txt")
    train, val = splits(source)
    assert sorted(train + val) == sorted([" kept as it is ", "# Käthe", "First\nnote\n\nend", "row one", "row two"])
    assert len(val) == 1
    summary = capsys.readouterr().out
    assert "5 documents of 51 characters, 1 of them for validation" in summary
    for skipped in (
        f"duplicates: 1 (first: {source}/copy.txt)", f"bytes that are not UTF-8 text: 3 (first: {source}/latin.txt)",
        f"no string `text`, or an empty one: 7 (first: {source}/empty.txt)", f"not .txt, .md, .jsonl, .parquet: 4 (first: {source}/gone.txt",
        "unreadable files: 1 (first: ",
    ):  # fmt: skip
        assert skipped in summary, skipped
    dataset.main(["--source", str(source)])
    assert "4 documents and validation shard shard_00001_" in capsys.readouterr().out


@given(st.lists(st.text("ab \n", max_size=30).map(lambda line: f"{line}\n" * 40), max_size=12))
def test_documents_of_plain_text_have_all_its_words_in_order_and_a_bounded_length(parts):
    text = "".join(parts)
    documents = list(dataset.cut_text(io.StringIO(text)))
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(len(document) <= 2 * dataset.LONGEST for document in documents)
    assert "".join(dataset.cut_text(io.StringIO("x" * 20000))) == "x" * 20000


def test_a_document_is_held_out_whatever_else_there_is_and_a_repeated_passage_is_dropped(base_dir, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(notes(3000))
    train, val = splits(path)
    assert not set(train) & set(val) and 0.02 < len(val) / len(train + val) < 0.1
    path.write_text("An introduction.\n\n" + notes(3000) + "\n" + notes(3000))
    more_train, more_val = splits(path)
    assert len({*train, *val} - {*more_train, *more_val}) <= 2
    assert not set(train) & set(more_val) and not set(val) & set(more_train)
    assert len(more_train + more_val) <= len(train + val) + 3
    path.write_text("short\n")
    with pytest.raises(UserError, match="at least 2 documents are needed, one of them for validation; found: 1"):
        splits(path)
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [len(split) for split in splits(tmp_path / "two.jsonl")] == [1, 1]


def test_a_file_is_prepared_once_and_anew_when_it_changes_and_a_resumed_run_notices(base_dir, tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    path.write_text(notes(2000))
    tokenizer = RustBPETokenizer.train_from_iterator([notes(50)], 300)
    before, fixed = splits(path), dataset.resolve(str(path))
    *_, state = next(loader(tokenizer, 2, 32, "train", device="cpu", source=fixed))
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_documents", pytest.fail)
        assert splits(path) == before
    os.utime(path, (1, 1))  # the same text, so the same shards
    assert [shard.name for shard in split_paths(str(path), "val")] == [shard.name for shard in split_paths(fixed, "val")]
    next(loader(tokenizer, 2, 32, "train", device="cpu", source=str(path), resume_state_dict=state))
    path.write_text(notes(2000).replace("Note 7 ", "Gnu 7 "))  # the same number of documents
    assert splits(fixed) == before and list(map(len, splits(path))) == list(map(len, before))
    with pytest.raises(UserError, match="shard_00000_.* has changed .* since the checkpoint was saved"):
        next(loader(tokenizer, 2, 32, "train", device="cpu", source=str(path), resume_state_dict=state))
    assert dataset.resolve("climbmix") == "climbmix"


@pytest.mark.parametrize("shard_chars, count, shards", [(5000, 200, 5), (1, 14, 13), (1, 15, 14)])
def test_much_text_makes_several_shards_in_another_order(base_dir, tmp_path, monkeypatch, shard_chars, count, shards):
    monkeypatch.setattr(dataset, "SHARD_CHARS", shard_chars)
    texts = [f"document {i} " * 10 for i in range(count)]
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train, val = splits(tmp_path / "notes.jsonl")
    assert sorted(train + val) == sorted(texts) and (shard_chars == 1 or train != sorted(train, key=texts.index))
    assert len(split_paths(str(tmp_path / "notes.jsonl"), "train")) == shards


def test_a_data_set_of_the_hub_is_read_up_to_a_number_of_shards(hub, base_dir, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "SHARD_CHARS", 5000)
    dataset.main(["--source", "hf:karpathy/climbmix-400b-shuffle", "-n", "2"])
    output = capsys.readouterr().out
    assert "2 training shards" in output and "what is beyond the shards of -n: 1" in output
    with pytest.raises(UserError, match="cannot read the data set openai/gsm8k:main from .* no `text` but question, answer"):
        dataset.main(["--source", "hf:openai/gsm8k:main"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    dataset.main(["--source", "hf:karpathy/climbmix-400b-shuffle"])  # prepared before, so the hub is not needed
    with pytest.raises(UserError, match="fake/none from http://127.0.0.1:9: nothing answers there"):
        dataset.main(["--source", "hf:fake/none"])


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


@pytest.mark.parametrize("faults, message, requests", [
    ([404], f"cannot download {NAME} from .*HTTP Error 404: Not Found", 1),  # final, not tried again
    ([503] * 3, "HTTP Error 503", 3),
    (["cut"] * 3, f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes", 3),
    ([], f"{NAME} is larger than 100 bytes", 1),
], ids=str)  # fmt: skip
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
