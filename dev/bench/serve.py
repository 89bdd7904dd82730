"""The web server as its clients see it: speed, disconnecting clients, malformed requests.

    python -m dev.bench.serve                     # all of it
    python -m dev.bench.serve streams --seconds 20
    python -m dev.bench.serve leave bad -i mid

    streams   1, 4, 16, 64 clients that send requests all the time: tok/s, fairness, time to first token, /health
    leave     500 requests, half of which disconnect at a random moment: is everything freed, are the other replies right?
    bad       2,000 malformed bodies: is each refused with a clear 4xx?

The server is a process of its own, `scripts.chat_web` with the newest model of the base folder on a free port; the
clients use plain sockets, since they share the cores with the model. Exits 1 if `leave` or `bad` find anything wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter

from dev.bench.serve_client import Reply, Server, ask, freed, get, post, send, stats

TOKENS = 200  # maximum length; at the highest temperature most replies reach it
LONG = {"max_tokens": TOKENS, "temperature": 2.0, "top_k": 200}
THINGS = "a dog,the sea,winter,bread,the moon,an old clock,numbers,a river,the king,a garden,iron,music,a bridge,rain".split(",")


def question(rng: random.Random) -> str:
    return f"Tell me about {rng.choice(THINGS)} and {rng.choice(THINGS)} in {rng.randint(2, 99)} words."


# -----------------------------------------------------------------------------
# streams


async def level(server: Server, clients: int, seconds: float, rng: random.Random) -> dict:
    """`clients` that each send one request after the other for so many seconds, while /health is polled."""
    replies: list[Reply] = []
    health: list[float] = []

    # Clients check the time themselves: before Python 3.12 `wait_for` may swallow a cancellation
    async def client():
        while time.perf_counter() < ends:
            replies.append(await send(server.port, ask(question(rng), seed=rng.getrandbits(30), **LONG)))

    async def poll_health():
        while time.perf_counter() < ends:
            health.append(-time.perf_counter())
            await send(server.port, get("/health"))
            health[-1] += time.perf_counter()
            await asyncio.sleep(0.05)

    before, started = await stats(server.port), time.perf_counter()
    ends = started + seconds
    tasks = [asyncio.create_task(work) for work in (*(client() for _ in range(clients)), poll_health())]
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
    """Half of many clients disconnect; returns what went wrong."""
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
          f"  sequences leaked       {leaked}\n  of those that stayed   {failed} failed, {other} differ from the answer given alone\n"
          f"  memory                 {memory:.0f} MB before, {grown:+.0f} MB")
    return [f"{leaked} sequences leaked"] * bool(leaked) + [f"{failed} requests failed"] * bool(failed) + [f"{other} answers differ"] * bool(other)


# -----------------------------------------------------------------------------
# bad

FIELDS = "messages role content type text temperature top_k top_p max_tokens max_completion_tokens seed n stop stream stream_options model".split()
VALUES = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "0.5", "1e308", "9" * 400, "9" * 5000, "null", "true", "undefined", "'x'", '""', '"x"',
          '"\\ud800"', '"\\u0000"', "[]", "[[]]", "[NaN]", "{}", '{"a": 1}', "[" * 900 + "]" * 900, "[" * 20000 + "]" * 20000,
          json.dumps("x" * 9000), json.dumps(["x"] * 600)]
TYPES = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml",
         "application/json; charset=utf-7", "\"", "json"]


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """(what is wrong, a request). A few are valid after all."""
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
    """Malformed requests; returns what went wrong."""
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

    return wrong + ["there is a traceback in the server's log"] * ("Traceback" in server.output())


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="The web server as its clients see it.", formatter_class=formatter)
    parser.add_argument("parts", nargs="*", default=["streams", "leave", "bad"], help="streams, leave, bad")
    parser.add_argument("-i", "--stage", default="sft", help="stage of the model: mid, sft or rl")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    parser.add_argument("--seconds", type=float, default=15, help="how long each number of clients asks")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args(argv)
    wrong = []
    if {"streams", "leave", "bad"} & set(args.parts):
        with Server("scripts.chat_web", "-p", "0", "-i", args.stage, "--device-type", args.device_type) as server:
            if "streams" in args.parts:
                asyncio.run(streams(server, args))
            for part in (leave, bad):
                if part.__name__ in args.parts:
                    wrong += asyncio.run(part(server, args))
    sys.exit("\n".join(["", "WRONG:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
