"""Downloads against real servers that misbehave: the file ends whole, or the error names it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat import download
from nanochat.common import UserError
from nanochat.download import download_file

CONTENT = random.Random(1).randbytes(300_000)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)


@pytest.fixture
def root(tmp_path):
    """A tree for the stand-in hub: one file with a SHA-256, one with a git blob id."""
    folder = tmp_path / "root" / "files"
    folder.mkdir(parents=True)
    (folder / "data.zip").write_bytes(CONTENT)
    (folder / "words.txt").write_bytes(CONTENT)
    return tmp_path / "root"


class Server(ThreadingHTTPServer):
    """Plays one answer after the other and notes the headers of each request."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = list(answers), []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        status, headers, body = self.server.answers[min(len(self.server.requests), len(self.server.answers)) - 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(body=CONTENT, **headers):
    return 200, {"Content-Length": str(len(body)), **headers}, body


# -----------------------------------------------------------------------------
# Every fault of the stand-in hub


@pytest.mark.parametrize("name", ["data.zip", "words.txt"])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["--fail-first", "2"],
        ["--truncate-first", "1"],
        ["--truncate-first", "12"],
        ["--corrupt-first", "1"],
        ["--corrupt-first", "3"],
        ["--slow", "600000"],
        ["--fail-first", "1", "--truncate-first", "3", "--corrupt-first", "1", "--slow", "3000000"],
    ],
    ids=" ".join,
)
def test_a_file_ends_whole_whatever_the_hub_does(start_hub, root, tmp_path, faults, name):
    url = start_hub(*faults, root=root)
    path = download_file(f"{url}/files/{name}", tmp_path / "here" / name)
    assert path == tmp_path / "here" / name
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [name]


@pytest.mark.parametrize("fault, cause", [("--fail-first", "503"), ("--corrupt-first", "SHA-256")])
def test_a_fault_that_stays_is_an_error_that_names_the_file(start_hub, root, tmp_path, fault, cause):
    url = start_hub(fault, "1000", root=root)
    with pytest.raises(UserError, match=f"data.zip.*{cause}"):
        download_file(f"{url}/files/data.zip", tmp_path / "data.zip")
    assert not (tmp_path / "data.zip").exists()


def test_a_hub_that_is_down_fails_plainly_after_few_seconds_of_waiting(tmp_path, monkeypatch):
    waits = []
    monkeypatch.undo()
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(UserError, match=r"(?s)cannot fetch shard\.parquet from http://127\.0\.0\.1:1/.*refused"):
        download_file("http://127.0.0.1:1/shard.parquet", tmp_path / "shard.parquet")
    assert sum(waits) < 10
    assert waits == sorted(waits)


def test_a_file_that_is_not_there_is_not_asked_for_twice(serve, tmp_path):
    server = serve((404, {"Content-Length": "0"}, b""))
    with pytest.raises(UserError, match="file.bin: the server answered 404 Not Found"):
        download_file(server.url, tmp_path / "file.bin")
    assert len(server.requests) == 1


# -----------------------------------------------------------------------------
# Resuming


def part_of(start, body=CONTENT, **headers):
    return 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}, body[start:]


def cut(at, body=CONTENT, **headers):
    return 200, {"Content-Length": str(len(body)), **headers}, body[:at]


def test_resume_asks_only_for_what_is_missing(serve, tmp_path):
    server = serve(cut(1000, ETag='"v1"'), part_of(1000, ETag='"v1"'))
    assert download_file(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert [r.get("Range") for r in server.requests] == [None, "bytes=1000-"]
    assert server.requests[1]["If-Range"] == '"v1"'


@pytest.mark.parametrize(
    "answers",
    [
        [cut(1000, ETag='"v1"'), whole(ETag='"v1"')],  # the server knows no ranges
        [cut(1000, ETag='"v1"'), whole(ETag='"v2"')],  # the file changed, and If-Range is honoured
        [cut(1000, b"old" * 999, ETag='"v1"'), part_of(1000, ETag='"v2"'), whole(ETag='"v2"')],  # ... is ignored
        [cut(1000, ETag='"v1"'), (416, {"Content-Length": "0"}, b""), whole(ETag='"v1"')],
        [cut(1000), whole()],  # nothing names the version, so nothing is kept
        [(200, {"Transfer-Encoding": "chunked"}, b"5\r\nabcde\r\n"), whole()],
    ],
)
def test_a_resume_that_cannot_be_trusted_starts_again(serve, tmp_path, answers):
    server = serve(*answers)
    assert download_file(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == len(answers)


def test_many_cuts_that_each_bring_something_do_not_use_up_the_tries(serve, tmp_path):
    steps = range(0, len(CONTENT), 10_000)
    answers = [(206 if at else 200, part_of(at, ETag='"v"')[1] | {"Content-Length": str(len(CONTENT) - at)},
                CONTENT[at:at + 10_000]) for at in steps]
    server = serve(*answers)
    assert download_file(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == len(steps) > download.ATTEMPTS


FETCH = "import sys; from nanochat.download import download_file; download_file(sys.argv[1], sys.argv[2])"


def test_a_killed_download_is_continued_by_the_next_process(start_hub, root, tmp_path, monkeypatch):
    path, part = tmp_path / "data.zip", tmp_path / "data.zip.part"
    slow = start_hub("--slow", "100000", root=root)
    process = subprocess.Popen([sys.executable, "-c", FETCH, f"{slow}/files/data.zip", str(path)])
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert not path.exists()

    asked, open_ = [], download._open
    monkeypatch.setattr(download, "_open", lambda request: asked.append(request.get_header("Range")) or open_(request))
    download_file(f"{start_hub(root=root)}/files/data.zip", path)
    assert asked == [f"bytes={kept}-"]
    assert path.read_bytes() == CONTENT


def test_many_processes_fetch_a_file_once(serve, tmp_path):
    server = serve(whole())
    command = [sys.executable, "-c", FETCH, server.url, str(tmp_path / "file.bin")]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [p.wait() for p in processes] == [0] * 4
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1


# -----------------------------------------------------------------------------
# Verification


def test_a_digest_named_only_in_the_redirect_is_checked(serve, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    damaged = whole(CONTENT[:-1] + b"?", ETag=f'"{"0" * 64}"')  # a storage's own ETag has no agreed meaning
    redirect = (302, {"Location": "/storage", "X-Linked-Etag": f'"{digest}"', "Content-Length": "0"}, b"")
    server = serve(redirect, damaged, redirect, whole(ETag=f'"{"0" * 64}"'))
    assert download_file(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_a_digest_from_the_caller_wins(serve, tmp_path):
    server = serve(whole(CONTENT + b"?"), whole())
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert download_file(server.url, tmp_path / "file.bin", sha256=sha256).read_bytes() == CONTENT


def test_content_refused_by_the_check_is_fetched_again(serve, tmp_path):
    server = serve(whole(b"an error page"), whole())

    def check(path):
        if path.read_bytes() != CONTENT:
            raise ValueError("not what was asked for")

    assert download_file(server.url, tmp_path / "file.bin", check=check).read_bytes() == CONTENT
    server = serve(whole(b"an error page"))
    with pytest.raises(UserError, match="other.bin.*not what was asked for"):
        download_file(server.url, tmp_path / "other.bin", check=check)
    assert not (tmp_path / "other.bin").exists()


def test_a_file_that_is_there_is_not_fetched(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    assert download_file("http://127.0.0.1:1/file.bin", tmp_path / "file.bin").read_bytes() == b"mine"


def test_a_silent_connection_counts_as_dead(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with socket.socket() as listener:  # takes connections and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match="file.bin.*timed out"):
            download_file(f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin", tmp_path / "file.bin")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_not_retried(serve, tmp_path):
    server = serve(whole())
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        download_file(server.url, tmp_path / "file.bin")
    assert caught.value.errno == errno.ENOSPC
    assert len(server.requests) == 1
