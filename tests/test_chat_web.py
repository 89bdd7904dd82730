"""The web server as a whole: clients that leave, a full line, failures, the end, and the program itself."""

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from chat_server import PATIENCE, TOKENIZER, ScriptedEngine, events_of, pieces_of, serving

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import Compute, UserError
from nanochat.conversation import render_for_completion
from nanochat.engine import Engine
from scripts.chat_web import listen, main

ROOT = Path(__file__).resolve().parents[1]
V1 = "/v1/chat/completions"


@pytest.fixture
def site():
    """A server of one engine with two rows, three may wait. Its steps wait for permission."""
    engine = ScriptedEngine(max_sequences=2)
    engine.hold()
    with serving(engine, max_queue=3) as site, ThreadPoolExecutor(8) as pool:
        site.in_background = pool.submit
        yield site
        if engine._permits:
            engine.release()


def wait_for_rows(site, number: int) -> None:
    """Until the server has so many requests. Each look asks the server itself, so this is no busy waiting."""
    for _ in range(2000):
        health = site.get("/health").json()
        if health["running"] + health["waiting"] == number:
            return
    raise AssertionError(health)


# -----------------------------------------------------------------------------
# How things are


def test_health_and_stats_answer_while_a_step_takes_its_time(site):
    answer = site.in_background(site.ask)
    assert site.engine.in_step.wait(PATIENCE)
    assert site.get("/health").json() == {
        "status": "ok", "ready": True, "model": "sft d2 step 8", "context": 400, "running": 1, "waiting": 0,
        "defaults": {"temperature": 0.8, "top_k": 50, "max_tokens": 512},
    }  # fmt: skip
    others = [site.in_background(site.ask) for _ in range(3)]
    wait_for_rows(site, 4)
    health = site.get("/health").json()
    assert (health["running"], health["waiting"]) == (2, 2)
    site.engine.release()
    assert [pieces_of(reply.result(PATIENCE)) for reply in (answer, *others)] == [[("text", "hello")]] * 4
    stats = site.get("/stats").json()
    assert stats.pop("uptime_s") >= 0
    assert stats == {
        "requests": 4, "completed": 4, "cancelled": 0, "failed": 0, "rejected": 0,
        "generated_tokens": 4 * len("hello."), "prefill_tokens": 0, "cached_tokens": 0,
        "workers": [{"device": "fake:0", "running": 0, "waiting": 0, "rows": 2}],
    }  # fmt: skip


def test_the_second_of_two_engines_serves_too():
    engines = [ScriptedEngine(max_sequences=2) for _ in range(2)]
    for engine in engines:
        engine.hold()
    with serving(*engines) as site, ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(site.ask, f"question {i}") for i in range(4)]
        wait_for_rows(site, 4)
        for engine in engines:
            engine.release()
        assert [pieces_of(reply.result(PATIENCE)) for reply in replies] == [[("text", "hello")]] * 4
        assert [len(engine.asked) for engine in engines] == [2, 2]


# -----------------------------------------------------------------------------
# Clients that leave


@pytest.mark.parametrize("path, settings", [
    ("/chat/completions", {}), (V1, {"stream": True}), (V1, {}), (V1, {"n": 2, "stream": True}), (V1, {"n": 2}),
])  # fmt: skip
def test_a_client_that_leaves_frees_its_rows(site, path, settings):
    """Before the next step: the one during which it left is the last."""
    rows = settings.get("n", 1)
    if settings.get("stream") or path != V1:
        with site.open(path=path, **settings) as response:
            site.engine.allow(1)
            lines = response.iter_lines()  # kept, since its end would be the client's leaving
            assert next(lines)
            assert site.engine.in_step.wait(PATIENCE)  # a stream of OpenAI's begins before the first token is there
    else:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **settings})
        with socket.create_connection(site.address.removeprefix("http://").split(":")) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            assert site.engine.in_step.wait(PATIENCE)
    wait_for_rows(site, 0)
    site.engine.allow(1)
    assert site.engine.dropped.wait(PATIENCE)
    site.engine.release()
    assert pieces_of(site.ask()) == [("text", "hello")]
    assert [row.finish_reason for row in site.engine.asked] == ["cancelled"] * rows + ["stop"]
    assert all(len(row.tokens) - row.prompt_length <= 2 for row in site.engine.asked[:rows])
    assert site.get("/stats").json()["cancelled"] == 1


def test_a_client_that_leaves_the_line_is_never_served(site):
    first = [site.in_background(site.ask) for _ in range(2)]
    wait_for_rows(site, 2)
    with site.open("waiting"):
        wait_for_rows(site, 3)
    wait_for_rows(site, 2)
    site.engine.release()
    assert [pieces_of(reply.result(PATIENCE)) for reply in first] == [[("text", "hello")]] * 2
    site.ask()  # by now its order to leave has been carried out, too
    waiting = next(row for row in site.engine.asked if "waiting" in TOKENIZER.decode(row.tokens))
    assert waiting.finish_reason == "cancelled" and len(waiting.tokens) == waiting.prompt_length


# -----------------------------------------------------------------------------
# Too many, failures, the end


@pytest.mark.parametrize("path", ["/chat/completions", V1])
def test_a_full_line_says_when_to_come_back(site, path):
    replies = [site.in_background(site.ask) for _ in range(5)]
    wait_for_rows(site, 5)
    response = site.ask(path=path)
    assert response.status_code == 503 and 1 <= int(response.headers["retry-after"]) <= 60
    assert response.json()["error"]["type"] == "server_busy" and "try again" in response.json()["error"]["message"]
    assert site.get("/stats").json()["rejected"] == 1
    site.engine.release()
    assert [pieces_of(reply.result(PATIENCE)) for reply in replies] == [[("text", "hello")]] * 5
    assert site.ask(path=path).status_code == 200


def test_a_failure_is_the_last_event_and_the_next_request_works(site, caplog):
    with site.open() as response:
        lines = response.iter_lines()
        site.engine.allow(1)
        assert json.loads(next(lines).removeprefix("data: ")) == {"token": "h", "type": "text"}
        site.engine.error = RuntimeError("a secret of the inside")
        site.engine.allow(1)
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [event.keys() for event in rest] == [{"error"}]
    assert rest[0]["error"]["type"] == "server_error" and "secret" not in json.dumps(rest)
    site.engine.release()
    assert pieces_of(site.ask()) == [("text", "hello")]
    assert "a secret of the inside" in caplog.text  # where it is ours to read


def test_an_engine_that_fails_again_and_again_shows_in_health(site):
    site.engine.release()
    for _ in range(3):
        site.engine.error = RuntimeError("again")
        assert "error" in events_of(site.ask())[-1]
    response = site.get("/health")
    assert response.status_code == 503 and response.json()["status"] == "failing" and response.json()["ready"] is False
    site.ask()
    assert site.get("/health").json()["status"] == "ok"


def test_the_end_lets_a_stream_finish_and_takes_nothing_new(site, monkeypatch):
    draining, drain = threading.Event(), site.workers.drain
    monkeypatch.setattr(site.workers, "drain", lambda *args, **kwargs: (draining.set(), drain(*args, **kwargs))[1])
    with site.open() as response:
        lines = response.iter_lines()
        site.engine.allow(1)
        assert json.loads(next(lines).removeprefix("data: "))["token"] == "h"
        site.server.handle_exit(signal.SIGTERM, None)
        assert draining.wait(PATIENCE)
        for reply in (site.ask(), site.ask(path=V1), site.get("/health")):
            assert reply.status_code == 503
        assert "shutting down" in site.ask().json()["error"]["message"] and site.ask().headers["retry-after"]
        site.engine.release()
        tokens = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event.get("token", "") for event in tokens) == "ello" and tokens[-1]["finish_reason"] == "stop"


def test_the_end_does_not_wait_for_ever(caplog):
    engine = ScriptedEngine()
    engine.hold()
    with serving(engine, grace=0) as site, site.open() as response:
        wait_for_rows(site, 1)
        site.server.handle_exit(signal.SIGTERM, None)
        (line,) = [line for line in response.iter_lines() if line]
        assert "shut down" in json.loads(line.removeprefix("data: "))["error"]["message"]
        engine.release()


def test_the_log_has_no_word_of_what_is_said(caplog):
    caplog.set_level(logging.DEBUG)
    for told in (False, True):
        with serving(ScriptedEngine(lambda prompt: "their secret"), log_content=told) as site:
            site.ask("my secret")
            site.ask("my secret", V1)
            site.ask("my secret", V1, stream=True, stop="secret")
            site.ask("my secret", temperature="secret")
            site.ask("my secret", V1, model="secret")
            site.post("/chat/completions", messages=[{"role": "secret"}])
            site.get("/secret")
        ours = [record.getMessage() for record in caplog.records if record.name.startswith(("nanochat", "uvicorn"))]
        assert ("secret" in str(ours)) is told and "wrote 12 in" in str(ours)


# -----------------------------------------------------------------------------
# A real engine


@pytest.fixture(scope="module")
def model(make_random_model):
    return make_random_model(TOKENIZER, sequence_len=256)


def test_what_a_real_engine_writes_for_many_is_what_it_writes_for_each(model):
    """Through OpenAI's client, 16 at once, some streaming, some with stop strings; against one at a time."""
    kinds = [
        {"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3, "stop": ["e", "k"]},
        {"temperature": 0.7, "seed": 5, "top_p": 0.8},
    ]  # fmt: skip
    questions = [[{"role": "user", "content": "x" * i}] for i in range(16)]
    requests = [{**kinds[i % 4], "messages": question, "max_tokens": 40, "model": "sft"} for i, question in enumerate(questions)]
    alone = Engine(model, TOKENIZER)

    def expected(request) -> str:
        settings = {key: value for key, value in request.items() if key not in ("messages", "model", "stop")}
        row = alone.submit(render_for_completion(TOKENIZER, request), top_k=50, **settings)
        while alone.busy:
            alone.step()
        text = TOKENIZER.decode([token for token in row.generated if token not in alone.terminal_tokens])
        return text[: min([len(text), *(at for stop in request.get("stop", []) if (at := text.find(stop)) >= 0)])]

    async def ask(client, request, stream):
        answer = await client.chat.completions.create(**request, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def ask_all(address):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, request, i % 3 == 0) for i, request in enumerate(requests)))

    with serving(Engine(model, TOKENIZER, max_sequences=4)) as site:
        assert asyncio.run(ask_all(site.address)) == [expected(request) for request in requests]
        assert site.get("/stats").json()["workers"] == [{"device": "fake:0", "running": 0, "waiting": 0, "rows": 4}]


# -----------------------------------------------------------------------------
# The program


@pytest.fixture
def base_dir(base_dir, model):
    TOKENIZER.save(base_dir / "tokenizer")
    compute = Compute(torch.device("cpu"), torch.float32)
    save_checkpoint(checkpoint_dir("sft", "d2"), 5, model.state_dict(), None, {"model_config": vars(model.config)}, TOKENIZER, compute)
    return base_dir


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_serves_until_it_is_told_to_stop(base_dir, number):
    server = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_web", "-p", "0", "--device-type", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background of a shell
    )  # fmt: skip
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
        line = server.stdout.readline()
        assert line.startswith("ready on http://127.0.0.1:"), line + server.stderr.read()
        body = {"messages": [{"role": "user", "content": "qqqq"}], "max_tokens": 200}
        with httpx.Client(base_url=line.removeprefix("ready on ").strip(), timeout=60) as client:
            assert client.get("/health").json()["model"] == "sft d2 step 5"
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                assert "token" in next(lines)
                server.send_signal(number)
                events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert events[-1]["done"] and events[-1]["usage"]["completion_tokens"] == 200
        _, log = server.communicate(timeout=60)
        assert server.returncode == 0 and "Traceback" not in log
        assert "wrote 200 in" in log and "qqqq" not in log
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


def test_a_port_in_use_is_told_in_a_line():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*--port") as caught:
            main(["-p", str(port), "--device-type", "cpu"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, says", [
    (["-p", "70000"], "--port is 70000"), (["-t", "3"], "--temperature is 3"), (["-k", "-1"], "--top-k is -1"),
    (["-m", "0"], "--max-tokens is 0"), (["-n", "0"], "--num-gpus is 0"), (["--max-sequences", "0"], "--max-sequences is 0"), (["--max-queue", "-1"], "--max-queue is -1"),
    (["--host", "no.such.host.example"], "cannot listen on no.such"), (["-n", "2"], "--num-gpus is 2"), (["-g", "d99"], "d99.*d2"),
])  # fmt: skip
def test_mistakes_are_told_in_a_line(base_dir, arguments, says):
    with pytest.raises(UserError, match=says):
        main(["-p", "0", "--device-type", "cpu", *arguments])


def test_torchrun_is_not_how_to_start_it(base_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        main(["-p", "0", "--device-type", "cpu"])
