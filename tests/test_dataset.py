"""Shards: which there are, which is for validation, how they are read and downloaded."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError, run_script
from nanochat.dataset import fetch_file


def write_shard(path: Path, texts: list, row_group_size: int = 2, column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path) -> str:
    """Three shards of five documents, two of them for training."""
    for shard in range(3):
        write_shard(tmp_path / "mine" / f"{shard}.parquet", [f"{shard}:{row}" for row in range(5)])
    return str(tmp_path / "mine")


def test_last_shard_is_the_validation_split(folder):
    assert [p.name for p in dataset.split_paths(folder, "train")] == ["0.parquet", "1.parquet"]
    assert [p.name for p in dataset.split_paths(folder, "val")] == ["2.parquet"]
    assert list(dataset.iter_documents("train", folder)) == [f"{s}:{r}" for s in (0, 1) for r in range(5)]
    assert list(dataset.iter_documents("val", folder)) == [f"2:{r}" for r in range(5)]


def test_batches_are_row_groups_and_ranks_share_them(folder):
    assert list(dataset.parquets_iter_batched("val", source=folder)) == [["2:0", "2:1"], ["2:2", "2:3"], ["2:4"]]
    shares = [list(dataset.iter_documents("train", folder, start=rank, step=2)) for rank in range(2)]
    assert sorted(sum(shares, [])) == list(dataset.iter_documents("train", folder))
    assert shares[1] == ["0:2", "0:3", "1:2", "1:3"]


def test_shard_is_opened_once_per_pass(folder, monkeypatch):
    opened, open_shard = [], dataset.open_shard
    monkeypatch.setattr(dataset, "open_shard", lambda path: opened.append(path.name) or open_shard(path))
    list(dataset.iter_documents("train", folder))
    assert opened == ["0.parquet", "1.parquet"]


def test_rows_without_text_are_skipped(tmp_path):
    write_shard(tmp_path / "0.parquet", ["a", None, "", "b"], row_group_size=4)
    assert list(dataset.iter_documents("val", str(tmp_path))) == ["a", "b"]
    assert dataset.count_rows([tmp_path / "0.parquet"]) == {"0.parquet": 4}


# -----------------------------------------------------------------------------
# User errors


def test_single_shard_leaves_nothing_to_train_on(tmp_path):
    write_shard(tmp_path / "0.parquet", ["a"])
    with pytest.raises(UserError, match="only one shard.*validation split, so there is nothing to train on"):
        dataset.split_paths(str(tmp_path), "train")
    assert len(dataset.split_paths(str(tmp_path), "val")) == 1


def test_error_without_data_says_how_to_download_it(base_dir):
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
def test_folder_without_usable_shards_is_refused(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        list(dataset.iter_documents("val", str(tmp_path)))


def test_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "0.parquet"
    write_shard(path, ["some text that takes a page " * 50])
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page's header
    path.write_bytes(data)
    with pytest.raises(UserError, match="0.parquet is damaged in row group 0"):
        list(dataset.iter_documents("val", str(tmp_path)))


def test_unknown_source_lists_the_known_ones(base_dir):
    with pytest.raises(UserError, match="climbmix, fineweb-edu, sample nor a folder"):
        dataset.shard_paths("climbmixx")


def test_sample_corpus_is_written_once_and_completely(base_dir, monkeypatch):
    calls = []

    def write_shards(directory):
        calls.append(directory)
        if len(calls) == 1:
            write_shard(Path(directory) / "shard_00000.parquet", ["half"])
            raise KeyboardInterrupt
        for shard in range(2):
            write_shard(Path(directory) / f"shard_{shard:05d}.parquet", [str(shard)])

    monkeypatch.setitem(sys.modules, "nanochat.sample_world", types.SimpleNamespace(write_shards=write_shards))
    with pytest.raises(KeyboardInterrupt):
        dataset.shard_paths("sample")
    for _ in range(2):
        assert list(dataset.iter_documents("train", "sample")) == ["0"]
        assert list(dataset.iter_documents("val", "sample")) == ["1"]
    assert len(calls) == 2


# -----------------------------------------------------------------------------
# Downloads


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `faults` (status, or number of bytes after which it hangs up) come first."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = files, list(faults), []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        body = self.server.files.get(self.path)
        if not head and "/api/" not in self.path:  # huggingface_hub's own
            self.server.requests.append(self.path)
        status, limit = (404 if body is None else 200), None
        if self.server.faults and not head:
            status, limit = self.server.faults.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if not head:
            self.wfile.write((body or b"")[:limit])


@pytest.fixture
def serve():
    servers = []

    def start(files, faults=()):
        servers.append(Server(files, faults))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def shard_files(tmp_path, source: str, names: list[str]) -> dict[str, bytes]:
    """The paths under which the hub has some shards, and their content."""
    for number, name in enumerate(names):
        write_shard(tmp_path / name, [f"{number}:{row} " + "text " * 400 for row in range(50)])
    repo = dataset.SOURCES[source][0]
    return {f"/datasets/{repo}/resolve/main/{name}": (tmp_path / name).read_bytes() for name in names}


NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]


def test_n_training_shards_and_the_last_are_downloaded_once(serve, tmp_path, base_dir, monkeypatch, capsys):
    server = serve(shard_files(tmp_path, "climbmix", NAMES))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    dataset.main(["-n", "2"])
    output = capsys.readouterr()
    assert "2 training shards with 100 documents and validation shard shard_06542.parquet" in output.out
    assert "3/3" in output.err and output.err.count("shard/s") >= 1
    assert [p.name for p in dataset.shard_paths("climbmix")] == NAMES
    assert next(dataset.iter_documents("val", "climbmix")).startswith("2:0 ")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    dataset.main(["-n", "2"])  # all shards exist, so the hub is not needed


def test_damaged_shard_is_deleted_and_reported(serve, tmp_path, base_dir, monkeypatch):
    files = shard_files(tmp_path, "climbmix", NAMES)
    server = serve({path: body[:-4] + b"????" if "00001" in path else body for path, body in files.items()})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(UserError, match="shard_00001.parquet is not a readable parquet file.*; it was deleted, run this again"):
        dataset.main(["-n", "2"])
    assert not (base_dir / "base_data" / "climbmix" / "shard_00001.parquet").exists()
    server.files = files
    dataset.main(["-n", "2"])
    assert len(dataset.shard_paths("climbmix")) == 3


def test_missing_shard_stops_the_rest(serve, tmp_path, base_dir, monkeypatch):
    server = serve(shard_files(tmp_path, "climbmix", ["shard_00000.parquet", "shard_06542.parquet"]))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(UserError, match="cannot download shard_00001.parquet of karpathy/climbmix.*404"):
        dataset.main(["-n", "-1", "-w", "1"])
    assert len(server.requests) == 2


def test_unreachable_hub_is_reported_at_once(base_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: dataset.main(["-n", "1"]))
    assert exit.value.code.startswith("error: cannot download shards of climbmix: nothing answers at http://127.0.0.1:1.")
    assert "\n" not in exit.value.code
    assert time.monotonic() - began < 10


CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(dataset, "WAITS", (0, 0, 0))


@pytest.mark.parametrize("faults", [[], [(503, 0)], [(200, 1000)], [(200, 1000), (429, 0)]], ids=str)
def test_file_is_complete_despite_faults_of_the_server(serve, tmp_path, no_waits, faults):
    server = serve({"/data.zip": CONTENT}, faults)
    path = fetch_file(f"{server.url}/data.zip", tmp_path / "here" / "data.zip")
    assert path == tmp_path / "here" / "data.zip" and path.read_bytes() == CONTENT
    assert len(server.requests) == len(faults) + 1
    fetch_file("http://127.0.0.1:1/data.zip", path)  # an existing file is kept
    assert sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock") == ["data.zip"]


@pytest.mark.parametrize(
    "faults, cause, requests",
    [
        ([(404, 0)], "HTTP Error 404: Not Found", 1),  # final, not tried again
        ([(503, 0)] * 3, "HTTP Error 503", 3),
        ([(200, 1000)] * 3, "the connection ended after 1,000 of 256,000 bytes", 3),
    ],
)
def test_failed_download_names_the_file_and_the_cause(serve, tmp_path, no_waits, faults, cause, requests):
    server = serve({"/data.zip": CONTENT}, faults)
    with pytest.raises(UserError, match=f"cannot download data.zip from .*{cause}"):
        fetch_file(f"{server.url}/data.zip", tmp_path / "data.zip")
    assert len(server.requests) == requests
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_content_that_fails_the_check_is_not_kept(serve, tmp_path, no_waits):
    def check(path):
        assert path.read_bytes() == b"an error page"
        raise ValueError("not a zip file")

    server = serve({"/data.zip": b"an error page"})
    with pytest.raises(UserError, match="data.zip from .*: not a zip file"):
        fetch_file(f"{server.url}/data.zip", tmp_path / "data.zip", check)
    assert not (tmp_path / "data.zip").exists()


def test_silent_server_times_out(tmp_path, no_waits, monkeypatch):
    import socket

    monkeypatch.setattr(dataset, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections and never answers
        with pytest.raises(UserError, match="data.zip.*timed out"):
            fetch_file(f"http://127.0.0.1:{listener.getsockname()[1]}/data.zip", tmp_path / "data.zip")


def test_concurrent_processes_download_a_file_once(serve, tmp_path):
    server = serve({"/data.zip": CONTENT})
    program = "import sys; from nanochat.dataset import fetch_file; fetch_file(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", program, f"{server.url}/data.zip", str(tmp_path / "data.zip")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [p.wait() for p in processes] == [0] * 3
    assert (tmp_path / "data.zip").read_bytes() == CONTENT
    assert len(server.requests) == 1
