"""The thread around an engine as clients see it: load, disconnects, failures, shutdown."""

import json
import logging
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_server import PAGE, ROUTES, TIMEOUT, TOKENIZER, V1, ScriptedEngine, events_in, message, segments_of, serving

from nanochat.common import UserError
from nanochat.conversation import render_for_completion
from nanochat.engine import Engine
from nanochat.engine_thread import EngineThread, Pool


@pytest.fixture
def held():
    """A server of one engine with two sequences, whose steps wait for permission; three replies may wait."""
    engine = ScriptedEngine(max_sequences=2)
    engine.hold()
    with serving(engine, max_queue=3) as site, ThreadPoolExecutor(8) as pool:
        site.in_background = pool.submit
        yield site
        engine.release()


def wait_for_replies(site, number: int) -> None:
    """Until the server has so many unfinished replies."""
    for _ in range(2000):
        health = site.get("/health").json()
        if health["running"] + health["waiting"] == number:
            return
    raise AssertionError(health)


def test_an_engine_is_made_in_its_thread_and_a_failure_reaches_the_starter():
    def fail():
        raise UserError(f"no model in {threading.current_thread().name}")

    pool = Pool([EngineThread(ScriptedEngine), EngineThread(fail, "fake:7")])
    with pytest.raises(UserError, match="no model in engine fake:7"):
        pool.start()
    pool.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]


def test_a_request_goes_to_the_engine_with_the_fewest_replies_and_not_to_a_failing_one():
    engines = [ScriptedEngine(), ScriptedEngine()]
    for engine in engines:
        engine.hold()
    with serving(*engines) as site, ThreadPoolExecutor(8) as pool:
        for i, (n, total) in enumerate([(2, 2), (1, 3), (2, 5), (1, 6), (1, 7), (1, 8)]):
            if i == 4:
                site.pool.threads[0].failures = 3
            pool.submit(site.ask, str(i), V1, n=n)
            wait_for_replies(site, total)
        for engine in engines:
            engine.release()
    requests = [{re.search(r"\d", TOKENIZER.decode(prompt))[0] for prompt in engine.prompts} for engine in engines]
    assert requests == [{*"03"}, {*"1245"}]


def test_health_and_stats_answer_during_a_step(held):
    replies = [held.in_background(held.ask) for _ in range(4)]
    wait_for_replies(held, 4)
    assert held.engine.in_step.wait(TIMEOUT)
    assert held.get("/health").json() == {
        "status": "ok", "ready": True, "model": "sft d2 step 8", "chats": True, "context": 400, "running": 2, "waiting": 2,
        "defaults": {"temperature": 0.8, "top_k": 50, "max_tokens": 512}, "examples": [],
    }  # fmt: skip
    held.engine.release()
    assert [segments_of(reply.result(TIMEOUT)) for reply in replies] == [[("text", "hello")]] * 4
    stats = held.get("/stats").json()
    held.engine.in_step.clear()
    assert not held.engine.in_step.wait(0.05), "an idle engine is not stepped"
    assert stats.pop("uptime_s") >= 0
    assert stats == {
        "requests": 4, "completed": 4, "cancelled": 0, "failed": 0, "rejected": 0, "generated_tokens": 4 * len("hello."),
        "prefill_tokens": held.engine.prefill_tokens, "cached_tokens": held.engine.cached_tokens,
        "workers": [{"device": "fake:0", "running": 0, "waiting": 0, "max_sequences": 2}],
    }  # fmt: skip


@pytest.mark.parametrize("path, extra", [(PAGE, {}), (V1, {"n": 2, "stream": True}), (V1, {"n": 2})])
def test_a_client_that_disconnects_frees_its_sequences_before_the_next_step(held, path, extra):
    n = extra.get("n", 1)
    body = json.dumps({"messages": [message()], **extra})
    with held.connect() as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        held.engine.allow(1)
        if extra != {"n": 2}:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        wait_for_replies(held, n)
        assert held.engine.in_step.wait(TIMEOUT)
    wait_for_replies(held, 0)
    held.engine.release()
    assert segments_of(held.ask()) == [("text", "hello")]
    assert [seq.finish_reason for seq in held.engine.submitted] == ["cancelled"] * n + ["stop"]
    assert all(len(seq.generated) <= 2 for seq in held.engine.submitted[:n])
    assert held.get("/stats").json()["cancelled"] == n


def test_a_full_queue_answers_503_and_a_waiting_client_that_disconnects_is_never_served(held):
    first = [held.in_background(held.ask) for _ in range(4)]
    wait_for_replies(held, 4)
    with held.open("waiting"):
        wait_for_replies(held, 5)
        for path in ROUTES:
            response = held.ask(path=path)
            assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "server_busy"
    wait_for_replies(held, 4)
    held.engine.release()
    assert [segments_of(reply.result(TIMEOUT)) for reply in first] == [[("text", "hello")]] * 4
    waiting = next(seq for seq in held.engine.submitted if "waiting" in TOKENIZER.decode(seq.tokens))
    assert waiting.finish_reason == "cancelled" and not waiting.generated
    assert held.get("/stats").json()["rejected"] == 2


def test_a_failed_step_is_the_last_event_and_repeated_failures_show_in_health(held, caplog):
    with held.open() as response:
        lines = response.iter_lines()
        held.engine.allow(1)
        assert events_in([next(lines)]) == [{"token": "h", "type": "text"}]
        held.engine.error = RuntimeError("an internal secret")
        held.engine.allow(1)
        (last,) = events_in(lines)
    assert last["error"]["type"] == "server_error" and "secret" not in json.dumps(last)
    assert "an internal secret" in caplog.text and "Traceback" in caplog.text
    held.engine.release()
    for _ in range(2):
        assert held.get("/health").json()["status"] == "ok"
        held.engine.error = RuntimeError("again")
        assert held.ask(path=V1).status_code == 500
    response = held.get("/health")
    assert response.status_code == 503 and response.json()["status"] == "failing" and response.json()["ready"] is False
    assert segments_of(held.ask()) == [("text", "hello")]
    assert held.get("/health").json()["status"] == "ok" and held.get("/stats").json()["failed"] == 3


def test_an_error_in_one_reply_ends_no_other(monkeypatch, caplog):
    monkeypatch.setattr("nanochat.engine.use_calculator", lambda text: 1 / 0)
    engine = ScriptedEngine(lambda prompt: "=<|python_start|>1<|python_end|>!" if "sum" in prompt else "hello")
    engine.hold()
    with serving(engine) as site, ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(site.ask, "sum", path) for path in ROUTES]
        good = pool.submit(site.ask)
        wait_for_replies(site, 3)
        engine.release()
        assert events_in(bad[0].result(TIMEOUT).text.split("\n"))[-1]["error"]["type"] == "server_error"
        assert bad[1].result(TIMEOUT).status_code == 500 and segments_of(good.result(TIMEOUT)) == [("text", "hello")]
        stats = site.get("/stats").json()
        assert stats["failed"] == 2 and stats["workers"][0]["running"] == 0 and site.pool.threads[0].failures == 0
    assert "division by zero" in caplog.text


def test_shutdown_refuses_new_requests_and_waits_for_running_replies_until_the_second_signal(held):
    with held.open() as response:
        lines = response.iter_lines()
        held.engine.allow(1)
        assert events_in([next(lines)])[0]["token"] == "h"
        held.server.handle_exit(signal.SIGTERM, None)
        while (health := held.get("/health")).status_code == 200:
            pass
        assert health.json()["status"] == "shutting down"
        for reply in (held.ask(), held.ask(path=V1)):
            assert reply.status_code == 503 and "shutting down" in reply.json()["error"]["message"]
        held.server.handle_exit(signal.SIGTERM, None)
        (last,) = events_in(lines)
        assert "shut down" in last["error"]["message"]


def test_the_log_holds_no_conversation(caplog):
    caplog.set_level(logging.DEBUG)
    with serving(ScriptedEngine(lambda prompt: "their secret")) as site:
        site.ask("my secret")
        site.ask("my secret", temperature="secret")
        for settings in ({}, {"stream": True, "stop": "secret"}, {"model": "secret"}):
            site.ask("my secret", V1, **settings)
        site.get("/secret")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("nanochat", "uvicorn"))]
    assert "secret" not in str(ours) and "12 generated in" in str(ours)


def test_concurrent_replies_of_a_real_engine_equal_replies_generated_alone(make_random_model):
    """16 at once, on both routes, streamed or not, some with stop strings."""
    model = make_random_model(TOKENIZER, sequence_len=256)
    kinds = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 5, "top_p": 0.8}]
    requests = [{**kinds[i % 3], "messages": [message("x" * i)], "max_tokens": 40} for i in range(16)]
    alone = Engine(model, TOKENIZER)

    def expected(i) -> str:
        settings = {key: value for key, value in requests[i].items() if key != "messages"}
        seq = alone.submit(render_for_completion(TOKENIZER, requests[i]), top_k=50, **settings)
        list(alone.finish())
        return re.split("[ek]" if i % 2 else "$", TOKENIZER.decode(seq.generated))[0]

    def send(i) -> str:
        body = {**requests[i], "stop": ["e", "k"] if i % 2 else None}
        if i % 3 == 0:
            return "".join(text for _, text in segments_of(site.post(PAGE, **body)))
        return site.post(V1, **body).json()["choices"][0]["message"]["content"]

    with serving(Engine(model, TOKENIZER, max_sequences=4)) as site, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(send, range(16))) == list(map(expected, range(16)))
        assert site.get("/stats").json()["workers"] == [{"device": "fake:0", "running": 0, "waiting": 0, "max_sequences": 4}]
