"""The web server's speed under load: 1, 4, 16, 64 clients that each send one request after the other.

    python -m dev.bench.serve                       # with the newest SFT model
    python -m dev.bench.serve --seconds 20 -i mid

The server is a process of its own (scripts.chat_web on a free port), and /health is polled meanwhile. The clients are
plain sockets, since they share the cores with the model.
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
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from nanochat import flags

ROOT = Path(__file__).resolve().parents[2]
THINGS = "a dog,the sea,winter,bread,the moon,an old clock,numbers,a river,the king,a garden,iron,music,a bridge,rain".split(",")


@contextmanager
def running_server(*flags: str):
    """A running scripts.chat_web; yields its port."""
    with tempfile.NamedTemporaryFile("w") as log:
        command = [sys.executable, "-m", "scripts.chat_web", "-p", "0", *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (ready := re.search(r"^ready on http://.*:(\d+)$", Path(log.name).read_text(), re.M)):
                if process.poll() is not None:
                    sys.exit(f"the server did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.1)
            yield int(ready[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


async def send(port: int, method: str, path: str, body: bytes = b"") -> tuple[bytes, list[float]]:
    """One request on its own connection: (body of the reply, times of its events in seconds after the request)."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    chunks, times = [], []
    while chunk := await reader.read(1 << 16):
        chunks.append(chunk)
        if b"data: " in chunk:
            times.append(time.perf_counter() - start)
    writer.close()
    head, _, content = b"".join(chunks).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head + content
    return content, times


async def measure(port: int, clients: int, seconds: float, rng: random.Random) -> tuple:
    """(tokens per second of all clients, of each reply, seconds until the first tokens, seconds of /health).

    At temperature 2 most replies reach their maximum length.
    """
    firsts, rates, health = [], [], []
    start = time.perf_counter()

    async def generated_tokens():
        return json.loads((await send(port, "GET", "/stats"))[0])["generated_tokens"]

    async def client():
        while time.perf_counter() < start + seconds:
            text = f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)} in {rng.randint(2, 99)} words."
            request = {"messages": [{"role": "user", "content": text}], "seed": rng.getrandbits(30)}
            request |= {"max_tokens": 200, "temperature": 2.0, "top_k": 200}
            body, times = await send(port, "POST", "/chat/completions", json.dumps(request).encode())
            firsts.append(times[0])
            if (tokens := body.count(b'"token"')) > 50:
                rates.append(tokens / (times[-1] - times[0]))

    async def poll_health():
        while time.perf_counter() < start + seconds:
            asked = time.perf_counter()
            await send(port, "GET", "/health")
            health.append(time.perf_counter() - asked)
            await asyncio.sleep(0.05)

    before = await generated_tokens()
    await asyncio.gather(poll_health(), *(client() for _ in range(clients)))
    return (await generated_tokens() - before) / (time.perf_counter() - start), rates, firsts, health


async def streams(port: int, seconds: float, seed: int) -> None:
    """A line for each number of clients."""
    rng = random.Random(seed)
    await measure(port, 2, 2, rng)  # warm-up
    print(f"\n{'clients':>7s}{'tok/s':>8s}{'x one':>7s}{'slowest/fastest':>17s}{'first token p50':>17s}{'max':>9s}"
          f"{'/health p99':>13s}{'replies':>9s}")
    single = None
    for clients in (1, 4, 16, 64):
        rate, rates, firsts, health = await measure(port, clients, seconds, rng)
        single = single or rate
        spread = min(rates) / max(rates) if rates else float("nan")
        print(f"{clients:7d}{rate:8.0f}{rate / single:7.2f}{spread:17.2f}{1e3 * median(firsts):14.0f} ms{1e3 * max(firsts):6.0f} ms"
              f"{1e3 * sorted(health)[int(0.99 * len(health))]:10.0f} ms{len(firsts):9d}", flush=True)


def main(argv=None):
    parser = flags.make_parser(__doc__.splitlines()[0])
    parser.add_argument("-i", "--stage", default="sft", help="stage of the model: mid, sft or rl")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu (empty: the best available)")
    parser.add_argument("--seconds", type=flags.number(float, 0.001), default=15, help="duration for each number of clients")
    parser.add_argument("--seed", type=flags.SEED, default=0, help="seed of the requests")
    args = parser.parse_args(argv)
    with running_server("-i", args.stage, "--device-type", args.device_type) as port:
        asyncio.run(streams(port, args.seconds, args.seed))


if __name__ == "__main__":
    main()
