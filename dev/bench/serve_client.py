"""A server process and a client on plain sockets, for dev/bench/serve.py: light, because the cores are shared with the model."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A server process, its output in `log`. Use it with `with`."""

    def __init__(self, *command: str):
        self.log = tempfile.NamedTemporaryFile("w+", prefix="serve-", suffix=".log")
        self.process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not (ready := re.search(r"^ready on http://.*:(\d+)$", self.output(), re.M)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                sys.exit(f"the server did not start:\n{self.output()}")
            time.sleep(0.1)
        self.port = int(ready[1])

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def usage(self) -> tuple[float, float]:
        """(seconds of processor time so far, memory in MB)"""
        import psutil

        process = psutil.Process(self.process.pid)
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss / 1e6

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@dataclass
class Reply:
    asked: float
    first: float = 0.0  # when the first token came
    last: float = 0.0
    raw: bytes = b""
    reads: int = 0
    left: bool = False

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1]) if self.raw.startswith(b"HTTP/1.1 ") else 0

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    def events(self) -> list[dict]:
        return [json.loads(event) for event in re.findall(rb"data: ({.*})\n\n", self.raw)]

    def text(self) -> str:
        if self.body.startswith(b"{"):
            return json.loads(self.body)["choices"][0]["message"]["content"]
        deltas = [choice["delta"].get("content", "") for event in self.events() for choice in event.get("choices", [])]
        return "".join(deltas or [event.get("token", "") for event in self.events()])


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode()


async def send(port: int, request: bytes, leave_after: float | None = None) -> Reply:
    """One request on a connection of its own; `leave_after` so many seconds, perhaps."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reply, chunks = Reply(time.perf_counter()), []

    async def read():
        while data := await reader.read(1 << 16):
            if not reply.first and b'"token"' in data:
                reply.first = time.perf_counter()
            chunks.append(data)
        reply.last = time.perf_counter()

    try:
        writer.write(request)
        await asyncio.wait_for(read(), 60 if leave_after is None else leave_after)
    except asyncio.TimeoutError:
        reply.left = True
    except ConnectionError:  # a server that has refused a large body need not read the rest of it
        pass
    finally:
        writer.transport.abort()
    reply.raw, reply.reads = b"".join(chunks), len(chunks)
    return reply


async def freed(port: int) -> int:
    """Rows that are still taken, once everything has had five seconds to be freed."""
    for _ in range(100):
        rows = sum(worker["running"] + worker["waiting"] for worker in (await stats(port))["workers"])
        if not rows:
            break
        await asyncio.sleep(0.05)
    return rows


async def stats(port: int) -> dict:
    return json.loads((await send(port, get("/stats"))).body)


def ask(text: str, path: str = "/chat/completions", **settings) -> bytes:
    return post(path, json.dumps({"messages": [{"role": "user", "content": text}], **settings}).encode())
