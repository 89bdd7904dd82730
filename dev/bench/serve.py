"""The web server as its clients see it: speed, clients that leave, requests that make no sense.

    python -m dev.bench.serve                     # all of it; about four minutes on two cores
    python -m dev.bench.serve streams --seconds 20
    python -m dev.bench.serve leave bad --source mid

    cost      processor time per token without a model: an engine that writes 16 streams at 130 tokens/s each
    streams   1, 4, 16, 64 clients that ask again and again: speed, fairness, time to the first token, /health
    leave     500 requests, half of which leave at a random moment: is everything freed, are the others' answers right?
    bad       2,000 malformed bodies and schemathesis: is each refused with a clear 4xx?

The one idea to know: the server is a process of its own, `scripts.chat_web` with the newest model of the base
folder on a free port, and this one only drives it, through plain sockets, because the cores are shared.
Exits 1 if `leave` or `bad` find anything wrong. What is random follows from --seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dev.bench.serve_client import Reply, Server, ask, freed, get, post, send, stats

TOKENS = 200  # the longest answer; the highest temperature makes most of them as long
LONG = {"max_tokens": TOKENS, "temperature": 2.0, "top_k": 200}
THINGS = "a dog,the sea,winter,bread,the moon,an old clock,numbers,a river,the king,a garden,iron,music,a bridge,rain".split(",")


def question(rng: random.Random) -> str:
    return f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)} in {rng.randint(2, 99)} words."


# -----------------------------------------------------------------------------
# cost


def serve_without_model() -> None:
    """A server whose engine does nothing but write the letter a, 130 times a second for every row."""
    from nanochat.serving import EngineThread, Workers
    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
    from scripts.chat_web import listen, make_app, make_server

    bytewise = RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})

    @dataclass(eq=False)
    class Row:
        left: int
        finish_reason: str | None = None

    class Metronome:
        tokenizer, context, max_sequences, terminal_tokens = bytewise, 4096, 64, frozenset()
        generated_tokens = prefill_tokens = cached_tokens = num_running = num_waiting = 0

        def __init__(self):
            self.rows, self.next_step = [], 0.0

        def submit(self, tokens, max_tokens, **_):
            self.rows.append(Row(max_tokens))
            return self.rows[-1]

        def cancel(self, row):
            self.rows = [other for other in self.rows if other is not row]

        def step(self):
            time.sleep(max(0, self.next_step - time.perf_counter()))
            self.next_step = max(self.next_step, time.perf_counter() - 0.1) + 1 / 130
            events = [(row, ord("a"), 1) for row in self.rows]
            for row in self.rows:
                row.left -= 1
                row.finish_reason = None if row.left else "length"
            self.rows = [row for row in self.rows if row.left]
            return events

    workers, sock = Workers([EngineThread(Metronome)]), listen("127.0.0.1", 0)
    workers.start()
    try:
        make_server(make_app(workers, "metronome"), workers, sock).run(sockets=[sock])
    finally:
        workers.stop()


async def cost(args) -> None:
    rows, tokens = 16, 1000
    print(f"\n{rows} streams of 130 tokens/s without a model\n{'route':22s} {'tok/s':>7s} {'us of server per token':>23s} {'tokens per read':>16s}")
    with Server("dev.bench.serve", "metronome") as server:
        for path in ("/chat/completions", "/v1/chat/completions"):
            await send(server.port, ask("warm up", path, stream=True, max_tokens=10))
            before, started = server.usage()[0], time.perf_counter()
            replies = await asyncio.gather(*(send(server.port, ask("hello", path, stream=True, max_tokens=tokens)) for _ in range(rows)))
            seconds, processor = time.perf_counter() - started, server.usage()[0] - before
            reads = sum(reply.reads for reply in replies)
            print(f"{path:22s} {rows * tokens / seconds:7,.0f} {processor / rows / tokens * 1e6:23.0f} {rows * tokens / reads:16.1f}")


# -----------------------------------------------------------------------------
# streams


async def level(server: Server, clients: int, seconds: float, rng: random.Random) -> dict:
    """`clients` that ask one question after the other for so long, while /health is asked, too."""
    replies: list[Reply] = []
    health: list[float] = []

    # They look at the clock themselves: before Python 3.12 `wait_for` may swallow that its task is cancelled.
    async def client():
        while time.perf_counter() < ends:
            replies.append(await send(server.port, ask(question(rng), seed=rng.getrandbits(30), **LONG)))

    async def patient():
        while time.perf_counter() < ends:
            health.append(-time.perf_counter())
            await send(server.port, get("/health"))
            health[-1] += time.perf_counter()
            await asyncio.sleep(0.05)

    before, started = await stats(server.port), time.perf_counter()
    ends = started + seconds
    tasks = [asyncio.create_task(work) for work in (*(client() for _ in range(clients)), patient())]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    after, elapsed = await stats(server.port), time.perf_counter() - started
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    await freed(server.port)
    written = [(reply, reply.events()[-1]["usage"]["completion_tokens"]) for reply in replies]
    rates = [(count - 1) / (reply.last - reply.first) for reply, count in written if count >= TOKENS // 4]
    firsts = sorted(reply.first - reply.asked for reply in replies if reply.first) or [float("nan")]
    health = sorted(delay for delay in health if delay > 0)
    return {"rate": (after["generated_tokens"] - before["generated_tokens"]) / elapsed, "replies": len(replies),
            "fair": min(rates) / max(rates) if rates else float("nan"), "first": firsts[len(firsts) // 2], "worst": firsts[-1],
            "health": health[int(len(health) * 0.99)] if health else float("nan")}


async def streams(server: Server, args) -> None:
    rng = random.Random(args.seed)
    await level(server, 2, 2, rng)  # warm up
    print(f"\n{'clients':>7s} {'tok/s':>7s} {'x one':>6s} {'slowest/fastest':>16s} {'first token p50':>16s} {'max':>8s} {'/health p99':>12s} "
          f"{'answers':>8s}")
    single = None
    for clients in (1, 4, 16, 64):
        seen = await level(server, clients, args.seconds, rng)
        single = single or seen["rate"]
        print(f"{clients:7d} {seen['rate']:7.0f} {seen['rate'] / single:6.2f} {seen['fair']:16.2f} "
              f"{seen['first'] * 1e3:13.0f} ms {seen['worst'] * 1e3:5.0f} ms {seen['health'] * 1e3:9.0f} ms {seen['replies']:8d}")


# -----------------------------------------------------------------------------
# leave


async def leave(server: Server, args) -> list[str]:
    """Half of many requests leave; returns what went wrong."""
    rng, port = random.Random(args.seed), server.port
    kinds = [{"path": "/chat/completions", "temperature": 0}, {"path": "/chat/completions", "temperature": 1.5, "top_k": 50},
             {"path": "/v1/chat/completions", "temperature": 1.0, "stream": True}, {"path": "/v1/chat/completions", "temperature": 1.0}]
    requests = [ask(question(rng), **rng.choice(kinds), max_tokens=64, seed=rng.getrandbits(30)) for _ in range(24)]
    alone = [(await send(port, request)).text() for request in requests]
    await asyncio.gather(*(send(port, request) for request in requests + requests[:8]))  # the cache has its size now
    gate, memory, before = asyncio.Semaphore(32), server.usage()[1], await stats(port)

    async def one(index: int, leave_after: float | None) -> tuple[int, Reply]:
        async with gate:
            return index, await send(port, requests[index], leave_after)

    plan = [(rng.randrange(len(requests)), rng.uniform(0, 0.5) if i % 2 else None) for i in range(500)]
    replies = await asyncio.gather(*(one(*item) for item in plan))
    leaked, after = await freed(port), await stats(port)
    stayed = [(index, reply) for (index, leave_after), (_, reply) in zip(plan, replies) if leave_after is None]
    failed = sum(reply.status != 200 for _, reply in stayed)
    other = sum(reply.status == 200 and reply.text() != alone[index] for index, reply in stayed)
    grown = server.usage()[1] - memory
    counts = {key: after[key] - before[key] for key in ("requests", "completed", "cancelled", "failed", "rejected")}
    print(f"\n500 requests, 32 at a time: {sum(reply.left for _, reply in replies)} left, {len(stayed)} were to stay\n"
          f"  the server counted     {', '.join(f'{count} {key}' for key, count in counts.items())}\n"
          f"  rows leaked            {leaked}\n  of those that stayed   {failed} failed, {other} differ from the answer given alone\n"
          f"  memory                 {memory:.0f} MB before, {grown:+.0f} MB")
    return [f"{leaked} rows leaked"] * bool(leaked) + [f"{failed} requests failed"] * bool(failed) + [f"{other} answers differ"] * bool(other)


# -----------------------------------------------------------------------------
# bad

FIELDS = "messages role content type text temperature top_k top_p max_tokens max_completion_tokens seed n stop stream stream_options model".split()
VALUES = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "0.5", "1e308", "9" * 400, "9" * 5000, "null", "true", "undefined", "'x'", '""', '"x"',
          '"\\ud800"', '"\\u0000"', "[]", "[[]]", "[NaN]", "{}", '{"a": 1}', "[" * 900 + "]" * 900, "[" * 20000 + "]" * 20000,
          json.dumps("x" * 9000), json.dumps(["x"] * 600)]
TYPES = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml",
         "application/json; charset=utf-7", "\"", "json"]


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """(what is wrong, a request). A few turn out to be sound after all."""
    path = rng.choice(["/chat/completions", "/v1/chat/completions"])
    sound = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body, kind = json.dumps(sound).encode(), rng.choice(["cut", "bytes", "value", "value", "inner value", "type", "top", "encoding", "size"])
    if kind == "cut":
        body = body[: rng.randrange(len(body))]
    elif kind == "bytes":
        body = bytes(rng.randrange(256) if rng.random() < 0.1 else byte for byte in body)
    elif kind == "value":
        body = json.dumps({**sound, rng.choice(FIELDS): "@"}).replace('"@"', rng.choice(VALUES)).encode()
    elif kind == "inner value":
        content = rng.choice(["hi", [{"type": "text", "text": "@"}], "@"])
        message = {"role": rng.choice(["user", "assistant", "system", "tool"]), "content": content, rng.choice(FIELDS): "@"}
        body = json.dumps({**sound, "messages": [message] * rng.choice([1, 2, 3])}).replace('"@"', rng.choice(VALUES)).encode()
    elif kind == "top":
        body = rng.choice(VALUES).encode()
    elif kind == "encoding":
        encoded = body.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]))
        body = rng.choice([encoded, rng.randbytes(rng.randrange(200))])
    elif kind == "size":
        body = json.dumps({**sound, rng.choice(FIELDS): "x" * rng.choice([900_000, 999_900, 1_100_000, 3_000_000])}).encode()
    return kind, post(path, body, rng.choice(TYPES) if kind == "type" else "application/json")


async def bad(server: Server, args) -> list[str]:
    """Requests that make no sense; returns what went wrong."""
    rng, gate, wrong = random.Random(args.seed), asyncio.Semaphore(16), []
    table: dict[str, Counter] = {}

    async def one(kind: str, request: bytes) -> None:
        async with gate:
            reply = await send(server.port, request)
        table.setdefault(kind, Counter())[reply.status] += 1
        if reply.left or reply.status not in (200, 400, 404, 413) or b"Traceback" in reply.raw:
            wrong.append(f"{kind}: status {reply.status} for {request[:300]!r}")
        elif reply.status != 200 and not {"message", "type", "param", "code"} == json.loads(reply.body)["error"].keys():
            wrong.append(f"{kind}: not an error in the agreed form: {reply.body[:300]!r}")

    await asyncio.gather(*(one(*malformed(rng)) for _ in range(2000)))
    statuses = sorted({status for counts in table.values() for status in counts})
    print(f"\n{'malformed':12s}" + "".join(f"{status:>6d}" for status in statuses))
    for kind, counts in sorted(table.items()):
        print(f"{kind:12s}" + "".join(f"{counts[status]:6d}" for status in statuses))

    with tempfile.TemporaryDirectory() as folder:  # where it leaves its reports
        Path(folder, "schemathesis.toml").write_text("[checks.negative_data_rejection]\nexpected-statuses = [400, 404, 405, 413]\n")
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json",
                   "--max-examples=200", f"--seed={args.seed}", "--phases=coverage,fuzzing", "--request-timeout=20", "--continue-on-failure", "--no-color",
                   "--exclude-checks=positive_data_acceptance"]  # a schema cannot say that roles take turns
        run = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = (await asyncio.wait_for(run.communicate(), 300))[0].decode()
    print(f"schemathesis: exit {run.returncode}; {' '.join(re.findall(r'^ *(?:[0-9]+ generated.*|[0-9]+ failures?.*)$', output, re.M))}")
    wrong += [f"schemathesis:\n{output}"] * bool(run.returncode)
    return wrong + ["there is a traceback in the server's log"] * ("Traceback" in server.output())


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="The web server as its clients see it.", formatter_class=formatter)
    parser.add_argument("parts", nargs="*", default=["cost", "streams", "leave", "bad"], help="cost, streams, leave, bad")
    parser.add_argument("--source", default="sft", help="which model serves: mid, sft or rl")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    parser.add_argument("--seconds", type=float, default=15, help="how long each number of clients asks")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args(argv)
    if args.parts == ["metronome"]:
        return serve_without_model()
    if "cost" in args.parts:
        asyncio.run(cost(args))
    wrong = []
    if {"streams", "leave", "bad"} & set(args.parts):
        with Server("scripts.chat_web", "-p", "0", "-i", args.source, "--device-type", args.device_type) as server:
            if "streams" in args.parts:
                asyncio.run(streams(server, args))
            for part in (leave, bad):
                if part.__name__ in args.parts:
                    wrong += asyncio.run(part(server, args))
    sys.exit("\n".join(["", "WRONG:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
