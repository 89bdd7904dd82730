"""The web server as its clients see it: speed under load, clients that disconnect.

    python -m dev.bench.serve                       # both, with the newest SFT model
    python -m dev.bench.serve streams --seconds 20 -i mid

    streams   1, 4, 16, 64 clients that each send one request after the other, while /health is polled
    leave     400 requests, half of whose clients disconnect: sequences leaked, replies that differ from the one sent alone

The server is a process of its own (scripts.chat_web on a free port); the clients are plain sockets, since they share
the cores with the model. The exit code is 1 if `leave` finds a mistake.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("/chat/completions", "/v1/chat/completions")
THINGS = "a dog,the sea,winter,bread,the moon,an old clock,numbers,a river,the king,a garden,iron,music,a bridge,rain".split(",")


# -----------------------------------------------------------------------------
# The server and a client


@contextmanager
def running_server(*flags: str):
    """A running scripts.chat_web; yields its port and its log file."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with open(log, "w") as output:
            command = [sys.executable, "-m", "scripts.chat_web", "-p", "0", *flags]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while not (ready := re.search(r"^ready on http://.*:(\d+)$", log.read_text(), re.M)):
                if process.poll() is not None:
                    sys.exit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield int(ready[1]), log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


async def send(port: int, method: str, path: str, body: bytes = b"", leave_after: float | None = None) -> tuple[int, bytes, list[float]]:
    """One request on its own connection: (status, body, times of the chunks after the request in seconds).

    `leave_after`: disconnect after so many seconds. Status 0: disconnected before the reply was complete.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    chunks, times, start = [], [], time.perf_counter()

    async def read():
        while chunk := await reader.read(1 << 16):
            chunks.append(chunk)
            if b"data: " in chunk:
                times.append(time.perf_counter() - start)

    try:
        headers = {"Host": "bench", "Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
        head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(head).encode() + body)
        await asyncio.wait_for(read(), leave_after or 120)
    except asyncio.TimeoutError:
        return 0, b"", times
    except ConnectionError:  # the server need not read the rest of a large body that it has refused
        pass
    finally:
        writer.transport.abort()
    head, _, content = b"".join(chunks).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), content, times


async def stats(port: int) -> dict:
    return json.loads((await send(port, "GET", "/stats"))[1])


async def sequences_left(port: int) -> int:
    """Sequences still running or waiting, once the server has had five seconds to free them."""
    for _ in range(100):
        left = sum(worker["running"] + worker["waiting"] for worker in (await stats(port))["workers"])
        if left == 0:
            break
        await asyncio.sleep(0.05)
    return left


def request(rng: random.Random, **settings) -> bytes:
    text = f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)} in {rng.randint(2, 99)} words."
    return json.dumps({"messages": [{"role": "user", "content": text}], "seed": rng.getrandbits(30), **settings}).encode()


# -----------------------------------------------------------------------------
# The two experiments


async def streams(port: int, args) -> None:
    """Rates and delays for a growing number of clients. At temperature 2 most replies reach their maximum length."""
    rng = random.Random(args.seed)
    print(f"\n{'clients':>7s}{'tok/s':>8s}{'x one':>7s}{'slowest/fastest':>17s}{'first token p50':>17s}{'max':>9s}"
          f"{'/health p99':>13s}{'replies':>9s}")
    single = None
    for clients in (2, 1, 4, 16, 64):  # the first is warm-up
        replies, health = [], []
        before, start = await stats(port), time.perf_counter()
        end = start + (2 if clients == 2 else args.seconds)

        async def client():
            while time.perf_counter() < end:
                _, body, times = await send(port, "POST", PATHS[0], request(rng, max_tokens=200, temperature=2.0, top_k=200))
                tokens = body.count(b'"token"')
                replies.append((times[0], tokens / (times[-1] - times[0]) if tokens > 50 else None))

        async def poll_health():
            while time.perf_counter() < end:
                health.append(-time.perf_counter())
                await send(port, "GET", "/health")
                health[-1] += time.perf_counter()
                await asyncio.sleep(0.05)

        await asyncio.gather(poll_health(), *(client() for _ in range(clients)))
        rate = ((await stats(port))["generated_tokens"] - before["generated_tokens"]) / (time.perf_counter() - start)
        if clients == 2:
            continue
        single = single or rate
        firsts, rates = [first for first, _ in replies], [rate for _, rate in replies if rate] or [float("nan")]
        print(f"{clients:7d}{rate:8.0f}{rate / single:7.2f}{min(rates) / max(rates):17.2f}{1e3 * median(firsts):14.0f} ms"
              f"{1e3 * max(firsts):6.0f} ms{1e3 * sorted(health)[int(0.99 * len(health))]:10.0f} ms{len(replies):9d}", flush=True)


async def leave(port: int, args) -> list[str]:
    """Clients that disconnect at a random moment must free their sequences and not change the other replies."""
    rng, gate = random.Random(args.seed), asyncio.Semaphore(32)
    requests = [(rng.choice(PATHS), request(rng, max_tokens=64, temperature=rng.choice([0, 1.5]), stream=True)) for _ in range(24)]
    text = lambda body: re.findall(rb'"(?:token|content)": ?("(?:[^"\\]|\\.)*")', body)
    alone = [text((await send(port, "POST", *one))[1]) for one in requests]
    assert all(alone), "a reply without text"
    before = await stats(port)

    async def one(index: int, leave_after: float | None) -> str:
        async with gate:
            status, body, _ = await send(port, "POST", *requests[index], leave_after=leave_after)
        return "left" if status == 0 else "failed" if status != 200 else "same" if text(body) == alone[index] else "different"

    plan = [(rng.randrange(len(requests)), rng.uniform(0.001, 0.5) if i % 2 else None) for i in range(400)]
    outcomes = Counter(await asyncio.gather(*(one(*item) for item in plan)))
    leaked, after = await sequences_left(port), await stats(port)
    print("\n400 requests, 32 at a time")
    print("clients: " + ", ".join(f"{outcomes[name]} {name}" for name in ("left", "same", "different", "failed")))
    print(f"server:  {after['completed'] - before['completed']} completed, {after['cancelled'] - before['cancelled']} cancelled, "
          f"{leaked} sequences leaked")
    mistakes = {"sequences leaked": leaked, "replies differ from the one sent alone": outcomes["different"], "requests failed": outcomes["failed"]}
    return [f"{count} {what}" for what, count in mistakes.items() if count]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["streams", "leave"], help="streams, leave")
    parser.add_argument("-i", "--stage", default="sft", help="stage of the model: mid, sft or rl")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best available)")
    parser.add_argument("--seconds", type=float, default=15, help="duration for each number of clients")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests")
    args = parser.parse_args(argv)
    wrong = []
    with running_server("-i", args.stage, "--device-type", args.device_type) as (port, log):
        for part in (streams, leave):
            if part.__name__ in args.parts:
                wrong += asyncio.run(part(port, args)) or []
        if "Traceback" in log.read_text():
            wrong.append(f"the server's log holds a traceback:\n{log.read_text()[-3000:]}")
    sys.exit("\n".join(["", "FAILED:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
