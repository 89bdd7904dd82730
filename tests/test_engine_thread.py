"""The thread around an engine, used from an event loop. What clients see of it is in test_server.py."""

import asyncio
import threading

import pytest
from chat_server import END, TIMEOUT, TOKENIZER, ScriptedEngine

from nanochat.common import UserError
from nanochat.engine_thread import EngineThread, Pool

PROMPT = TOKENIZER.encode("hi")


def run(scenario, *engines):
    """Run `await scenario(pool)` with engines in threads, which have ended afterwards."""
    pool = Pool([EngineThread(lambda engine=engine: engine, f"fake:{i}") for i, engine in enumerate(engines)])
    pool.start()
    try:
        asyncio.run(asyncio.wait_for(scenario(pool), TIMEOUT))
    finally:
        pool.stop()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine fake")]


async def all_tokens(thread, request) -> list:
    return [pair async for pairs in thread.tokens(request) for pair in pairs]


def test_tokens_of_a_reply_come_in_order_with_its_end_last():
    async def scenario(pool):
        expected = [*b"hello", END, None]
        thread, request = pool.submit(PROMPT, n=2, max_tokens=100)
        other = pool.submit(PROMPT, max_tokens=100)
        assert await all_tokens(*other) == [(0, token) for token in expected]
        tokens = await all_tokens(thread, request)  # a slow reader has lost nothing
        assert [[token for index, token in tokens if index == i] for i in range(2)] == [expected] * 2
        assert request.finish_reasons == ["stop"] * 2 and not thread.requests
        assert [seq.settings["sample_index"] for seq in thread.engine.submitted] == [0, 1, 0]
        steps = thread.engine.steps
        await asyncio.sleep(0.05)
        assert thread.engine.steps == steps  # an idle engine is not stepped

    run(scenario, ScriptedEngine())


def test_the_loop_is_called_once_per_step():
    async def scenario(pool):
        engine, loop, calls = pool.threads[0].engine, asyncio.get_running_loop(), []
        engine.hold()
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda work, *args: (calls.append(threading.current_thread().name), call(work, *args))
        requests = [pool.submit(PROMPT, max_tokens=100) for _ in range(4)]
        engine.release()
        for request in requests:
            await all_tokens(*request)
        assert calls.count("engine fake:0") == engine.steps

    run(scenario, ScriptedEngine())


def test_a_request_goes_to_the_engine_with_the_fewest_replies_and_not_to_a_failing_one():
    async def scenario(pool):
        assert [pool.submit(PROMPT, n)[0].device for n in (2, 1, 2, 1)] == ["fake:0", "fake:1", "fake:1", "fake:0"]
        pool.threads[0].failures = 3
        assert {pool.submit(PROMPT)[0].device for _ in range(9)} == {"fake:1"}
        await pool.drain(TIMEOUT)

    run(scenario, ScriptedEngine(), ScriptedEngine())


def test_the_engine_is_made_in_its_thread_and_a_failure_reaches_the_starter():
    names = []

    def fail():
        names.append(threading.current_thread().name)
        raise UserError("no model")

    pool = Pool([EngineThread(ScriptedEngine), EngineThread(fail, "fake:7")])
    try:
        with pytest.raises(UserError, match="no model"):
            pool.start()
    finally:
        pool.stop()
    assert names == ["engine fake:7"]
