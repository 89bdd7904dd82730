"""The web server under load and under attack.

    python -m dev.bench.serve                       # with the newest SFT model
    python -m dev.bench.serve --seconds 20 -i mid
    python -m dev.bench.serve bad                   # and: soak --seconds 600

streams: the speed for 1, 4, 16, 64 clients that each send one request after the other. bad: what an honest client sees
of slow clients, large bodies and disconnects. soak: random requests, 40 per second. The server is a process of its own
(scripts.chat_web on a free port). The clients are plain sockets, since they share the cores with the model.
"""

from __future__ import annotations

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
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import psutil

from nanochat import flags
from nanochat.common import raise_file_limit

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("/chat/completions", "/v1/chat/completions")
THINGS = "a dog,the sea,winter,bread,the moon,an old clock,numbers,a river,the king,a garden,iron,music,a bridge,rain".split(",")


@contextmanager
def running_server(*arguments: str):
    """A running scripts.chat_web; yields its port and its process."""
    with tempfile.NamedTemporaryFile("w") as log:
        command = [sys.executable, "-m", "scripts.chat_web", "-p", "0", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (ready := re.search(r"^ready on http://.*:(\d+)$", Path(log.name).read_text(), re.M)):
                if process.poll() is not None:
                    sys.exit(f"the server did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.1)
            yield int(ready[1]), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def question(rng: random.Random, **settings) -> bytes:
    text = f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)} in {rng.randint(2, 99)} words."
    return json.dumps({"messages": [{"role": "user", "content": text}], "seed": rng.getrandbits(30), **settings}).encode()


async def send(port: int, path: str, body=b"", sent=1.0, leave_after=120.0) -> tuple[int, bytes, list[float]]:
    """One request on its own connection: (status, body of the reply, times of its events in seconds after the request).

    Status 0: there was no answer before the client left. `sent`: share of the request that is sent.
    """
    start, chunks, times = time.perf_counter(), [], []
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    data = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def exchange():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data[: int(sent * len(data))])
            while chunk := await reader.read(1 << 16):
                chunks.append(chunk)
                if b"data: " in chunk:
                    times.append(time.perf_counter() - start)
        finally:
            writer.transport.abort()

    # After an error the server closes the connection, and need not read the whole body
    with suppress(ConnectionError, asyncio.TimeoutError):
        await asyncio.wait_for(exchange(), leave_after)
    head, _, content = b"".join(chunks).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, content, times


async def poll_health(port: int, seconds: float) -> list[float]:
    """The durations of GET /health."""
    durations, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        asked = time.perf_counter()
        await send(port, "/health")
        durations.append(time.perf_counter() - asked)
        await asyncio.sleep(0.05)
    return durations


async def streams(port: int, process, seconds: float, rng: random.Random) -> None:
    """A line for each number of clients. At temperature 2 most replies reach their maximum length."""

    async def generated_tokens():
        return json.loads((await send(port, "/stats"))[1])["generated_tokens"]

    await send(port, PATHS[0], question(rng))  # warm-up
    print(f"\n{'clients':>7s}{'tok/s':>8s}{'x one':>7s}{'slowest/fastest':>17s}{'first token p50':>17s}{'max':>9s}"
          f"{'/health p99':>13s}{'replies':>9s}")
    single = None
    for clients in (1, 4, 16, 64):
        firsts, rates = [], []  # of each reply: seconds until its first tokens, tokens per second
        start, before = time.perf_counter(), await generated_tokens()

        async def client():
            while time.perf_counter() < start + seconds:
                request = question(rng, max_tokens=200, temperature=2.0, top_k=200)
                _, body, times = await send(port, PATHS[0], request)
                firsts.append(times[0])
                if (tokens := body.count(b'"token"')) > 50:
                    rates.append(tokens / (times[-1] - times[0]))

        health, *_ = await asyncio.gather(poll_health(port, seconds), *(client() for _ in range(clients)))
        rate = (await generated_tokens() - before) / (time.perf_counter() - start)
        single = single or rate
        spread = min(rates) / max(rates) if rates else float("nan")
        print(f"{clients:7d}{rate:8.0f}{rate / single:7.2f}{spread:17.2f}{1e3 * median(firsts):14.0f} ms{1e3 * max(firsts):6.0f} ms"
              f"{1e3 * sorted(health)[int(0.99 * len(health))]:10.0f} ms{len(firsts):9d}", flush=True)


async def open_loop(rate: float, seconds: float, request) -> list:
    """Starts `rate` requests per second, whatever becomes of the earlier ones; `request` is an async function."""
    start, tasks = time.perf_counter(), []
    for i in range(int(rate * seconds)):
        await asyncio.sleep(start + i / rate - time.perf_counter())
        tasks.append(asyncio.create_task(request()))
    return await asyncio.gather(*tasks)


ATTACKS = {  # name -> (requests per second, the arguments of `send` for one); 200 per second that stay 10 s are 2,000
    "nothing": (1, lambda rng: {"path": "/health"}),
    "slow clients": (200, lambda rng: {"sent": rng.random(), "leave_after": 10}),
    "long texts": (8, lambda rng: {"body": json.dumps({"messages": [{"role": "user", "content": "7 the " * 160_000}]}).encode()}),
    "small lists": (8, lambda rng: {"body": b'{"x": [' + b"[]," * 320_000 + b"1]}"}),
    "disconnects": (40, lambda rng: {"leave_after": rng.uniform(0, 0.3)}),
}


async def bad(port: int, process, seconds: float, rng: random.Random) -> None:
    """A line for each attack. `same`: afterwards no sequence is left, and a greedy reply is as before."""

    async def honest():
        _, _, times = await send(port, PATHS[0], question(rng, max_tokens=4))
        return times[0] if times else float("inf")

    async def state():
        _, reply, _ = await send(port, PATHS[1], question(random.Random(0), max_tokens=30, temperature=0))
        health = json.loads((await send(port, "/health"))[1])
        return json.loads(reply).get("choices"), health["running"] + health["waiting"]

    before = await state()
    print(f"\n{'attack':14s}{'first token max':>16s}{'/health max':>14s}{'same':>6s}{'memory before, after':>24s}")
    for name, (rate, arguments) in ATTACKS.items():
        memory = process.memory_info().rss

        async def attack():
            await send(**{"port": port, "path": rng.choice(PATHS), "body": question(rng, max_tokens=200), **arguments(rng)})

        firsts, health, _ = await asyncio.gather(
            open_loop(2, seconds, honest), poll_health(port, seconds), open_loop(rate, seconds, attack))  # fmt: skip
        same = "yes" if await state() == before else "NO"
        print(f"{name:14s}{1e3 * max(firsts):13.0f} ms{1e3 * max(health):11.0f} ms{same:>6s}{memory / 2**20:15.0f}, "
              f"{process.memory_info().rss / 2**20:.0f} MiB", flush=True)


async def soak(port: int, process, seconds: float, rng: random.Random) -> None:
    """40 requests per second: random settings, clients that leave, bad bodies. "lost": an answer without its end."""
    counts, choices = Counter(), {"temperature": [0, 1e-50, 0.8, 2], "top_k": [0, 1, 200], "top_p": [1e-300, 0.5, 1],
                                  "max_tokens": [1, 16, 100], "seed": [0, -(10**30)], "stop": ["e", None]}  # fmt: skip

    async def request():
        body = question(rng, stream=True, **{key: rng.choice(values) for key, values in choices.items()})
        if rng.random() < 0.2:
            body = rng.choice([body[:-9], body.replace(b"user", b"robot"), b"[" * 100_000, b" " * 2_000_000 + body])
        leaves = rng.random() < 0.2
        status, reply, _ = await send(port, rng.choice(PATHS), body, leave_after=rng.random() if leaves else 120)
        complete = status and (status != 200 or re.search(rb'"done": true|\[DONE\]', reply))
        counts[status if complete else "left" if leaves else "lost"] += 1

    for _ in range(10):
        await open_loop(40, seconds / 10, request)
        print(f"{process.memory_info().rss / 2**20:.0f} MiB; {dict(counts)}", flush=True)
    wrong = [key for key in counts if key == "lost" or isinstance(key, int) and key >= 500 and key != 503]
    sys.exit(f"FAILED: {wrong}" if wrong else 0)


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("part", nargs="?", default="streams", choices=["streams", "bad", "soak"], help="what to measure")
    parser.add_argument("-i", "--stage", default="sft", help="stage of the model: mid, sft or rl")
    flags.add_device_flag(parser)
    parser.add_argument("--seconds", type=flags.number(float, 0.001), default=15, help="for each number of clients or attack, or in all")
    parser.add_argument("--seed", type=flags.SEED, default=0, help="seed of the requests")
    args = parser.parse_args(argv)
    with running_server("-i", args.stage, "--device-type", args.device_type) as (port, process):
        raise_file_limit()
        part = {"streams": streams, "bad": bad, "soak": soak}[args.part]
        asyncio.run(part(port, process, args.seconds, random.Random(args.seed)))


if __name__ == "__main__":
    main()
