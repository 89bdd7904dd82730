"""The thread around an engine, seen from an event loop."""

import asyncio
import logging
import threading

import pytest
from chat_server import END, PATIENCE, TOKENIZER, ScriptedEngine

from nanochat.common import UserError
from nanochat.serving import EngineFailure, EngineThread, Refused, Workers

PROMPT = TOKENIZER.encode("hi")


def with_workers(scenario, *engines, **options):
    """Run `await scenario(workers)` with engines in threads, which have ended afterwards."""
    workers = Workers([EngineThread(lambda engine=engine: engine, f"fake:{i}", **options) for i, engine in enumerate(engines)])
    workers.start()
    try:
        return asyncio.run(asyncio.wait_for(scenario(workers), PATIENCE))
    finally:
        for engine in engines:
            if engine._permits:
                engine.release()
        workers.stop()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine fake")]


async def text_of(answer, index=0) -> str:
    tokens = []
    while news := await answer.take():
        tokens += [token for row, token in news if row == index and token not in (None, END)]
    return TOKENIZER.decode(tokens)


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE)


# -----------------------------------------------------------------------------
# Answers


def test_tokens_come_in_order_and_the_end_last():
    async def scenario(workers):
        answer, news = workers.submit("a", PROMPT, max_tokens=100), []
        while more := await answer.take():
            news += more
        assert news == [*((0, token) for token in b"hello"), (0, END), (0, None)]
        assert await answer.take() == []
        assert answer.finish_reasons == ["stop"]
        assert answer.usage() == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}

    with_workers(scenario, ScriptedEngine())


def test_rows_of_one_request_are_told_apart():
    async def scenario(workers):
        answer, heard = workers.submit("a", PROMPT, n=3, max_tokens=100), {0: "", 1: "", 2: ""}
        while news := await answer.take():
            for index, token in news:
                heard[index] += "" if token in (None, END) else chr(token)
        assert heard == dict.fromkeys(range(3), "hello")
        assert [row.settings["sample_index"] for row in workers.threads[0].engine.asked] == [0, 1, 2]

    with_workers(scenario, ScriptedEngine())


def test_a_slow_reader_finds_everything_at_once_and_holds_up_nobody():
    async def scenario(workers):
        slow, quick = (workers.submit(name, PROMPT, max_tokens=100) for name in "ab")
        assert await text_of(quick) == "hello"
        assert [token for _, token in await slow.take()] == [*b"hello", END, None]

    with_workers(scenario, ScriptedEngine())


def test_the_loop_is_called_once_per_step_for_all_rows():
    async def scenario(workers):
        engine, loop, calls = workers.threads[0].engine, asyncio.get_running_loop(), []
        engine.hold()
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda work, *args: (calls.append(threading.current_thread().name), call(work, *args))
        answers = [workers.submit("a", PROMPT, max_tokens=100) for _ in range(4)]
        engine.release()
        for answer in answers:
            await text_of(answer)
        assert calls.count("engine fake:0") == engine.steps

    with_workers(scenario, ScriptedEngine())


def test_nothing_is_stepped_when_there_is_nothing_to_write():
    async def scenario(workers):
        for _ in range(3):
            await text_of(workers.submit("a", PROMPT, max_tokens=100))
        assert workers.threads[0].engine.steps == 3 * len("hello.")

    with_workers(scenario, ScriptedEngine())


def test_what_the_engine_has_against_a_request_reaches_whoever_asked():
    async def scenario(workers):
        with pytest.raises(UserError, match="does not like this"):
            await workers.submit("a", TOKENIZER.encode("refuse me"), n=2).take()
        assert await text_of(workers.submit("a", PROMPT)) == "hello"

    with_workers(scenario, ScriptedEngine())


# -----------------------------------------------------------------------------
# Failures


def test_an_engine_that_cannot_be_made_is_told_to_whoever_starts_it():
    def fail():
        raise UserError("no model")

    workers = Workers([EngineThread(ScriptedEngine), EngineThread(fail)])
    try:
        with pytest.raises(UserError, match="no model"):
            workers.start()
    finally:
        workers.stop()  # also those that have started


def test_an_engine_is_made_in_the_thread_that_will_use_it():
    makers = []
    worker = EngineThread(lambda: makers.append(threading.current_thread().name) or ScriptedEngine(), "fake:7")
    worker.start()
    worker.stop()
    assert makers == ["engine fake:7"]


def test_a_failing_step_fails_those_it_was_for_and_nobody_after(caplog):
    async def scenario(workers):
        engine = workers.threads[0].engine
        engine.hold()
        answers = [workers.submit("a", PROMPT, n=2, max_tokens=100) for _ in range(2)]
        engine.allow(2)
        await answers[0].take()
        engine.error = RuntimeError("the secret of the inside")
        engine.release()
        for answer in answers:
            with pytest.raises(EngineFailure) as caught:
                await text_of(answer)
            assert "secret" not in str(caught.value)
        assert await text_of(workers.submit("a", PROMPT)) == "hello"
        assert workers.counts() == {"requests": 3, "failed": 2, "completed": 1}

    with_workers(scenario, ScriptedEngine())
    assert "the secret of the inside" in caplog.text and "Traceback" in caplog.text  # for us, in the log


def test_an_engine_that_fails_again_and_again_is_out_of_order_until_it_works(caplog):
    async def scenario(workers):
        for _ in range(3):
            assert not workers.threads[0].failing
            workers.threads[0].engine.error = RuntimeError("again")
            with pytest.raises(EngineFailure):
                await workers.submit("a", PROMPT).take()
        assert workers.threads[0].failing
        assert await text_of(workers.submit("a", PROMPT)) == "hello"
        assert not workers.threads[0].failing

    with_workers(scenario, ScriptedEngine())


# -----------------------------------------------------------------------------
# The line


def test_a_full_line_refuses_and_says_when_to_come_back():
    async def scenario(workers):
        engine = workers.threads[0].engine
        engine.hold()
        answers = [workers.submit("a", PROMPT, max_tokens=100) for _ in range(2 + 3)]
        with pytest.raises(Refused) as caught:
            workers.submit("a", PROMPT)
        assert 1 <= caught.value.retry_after <= 60
        assert workers.rejected == 1 and workers.threads[0].waiting == 3
        answers[-1].cancel()
        answers[-1] = workers.submit("a", PROMPT, max_tokens=100)
        engine.release()
        assert [await text_of(answer) for answer in answers] == ["hello"] * 5

    with_workers(scenario, ScriptedEngine(max_sequences=2), max_queue=3)


def test_the_idlest_gets_what_is_new_and_a_conversation_stays_where_it_was():
    async def scenario(workers):
        engines = [thread.engine for thread in workers.threads]
        for engine in engines:
            engine.hold()
        answers = {name: workers.submit(name, PROMPT, max_tokens=100) for name in "abcd"}
        homes = {name: answer.worker for name, answer in answers.items()}
        assert sorted(home.device for home in homes.values()) == ["fake:0", "fake:0", "fake:1", "fake:1"]
        for engine in engines:
            engine.release()
        for answer in answers.values():
            await text_of(answer)
        for engine in engines:
            engine.hold()
        again = [workers.submit(name, PROMPT) for name in "aabbcd"]
        assert [answer.worker for answer in again] == [homes[name] for name in "aabbcd"]
        # ... unless it would have to wait there while others have room
        crowd = [workers.submit("a", PROMPT).worker for _ in range(8)]
        assert {worker.device for worker in crowd} == {"fake:0", "fake:1"}
        assert abs(workers.threads[0].active - workers.threads[1].active) <= 3

    with_workers(scenario, ScriptedEngine(max_sequences=8), ScriptedEngine(max_sequences=8))


def test_a_worker_that_is_out_of_order_is_avoided():
    async def scenario(workers):
        workers.threads[0].failures = 3
        assert {workers.submit(name, PROMPT).worker.device for name in "abc"} == {"fake:1"}

    with_workers(scenario, ScriptedEngine(), ScriptedEngine())


def test_draining_lets_answers_end_and_takes_no_new_ones():
    async def scenario(workers):
        engine = workers.threads[0].engine
        engine.hold()
        answer = workers.submit("a", PROMPT, max_tokens=100)
        draining = asyncio.create_task(workers.drain(PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="shutting down"):
            workers.submit("a", PROMPT)
        assert not draining.done()
        engine.release()
        assert await text_of(answer) == "hello"
        await draining

    with_workers(scenario, ScriptedEngine())


def test_draining_has_an_end():
    async def scenario(workers):
        workers.threads[0].engine.hold()
        answer = workers.submit("a", PROMPT)
        await workers.drain(grace=0)
        with pytest.raises(EngineFailure, match="shut down"):
            await answer.take()

    with_workers(scenario, ScriptedEngine())


def test_the_log_has_the_conversation_only_if_asked(caplog):
    caplog.set_level(logging.INFO)

    async def scenario(workers):
        answer = workers.submit("a", TOKENIZER.encode("my secret"), max_tokens=100)
        await text_of(answer)
        answer.log()

    with_workers(scenario, ScriptedEngine(lambda prompt: "their secret"))
    assert "read 9 tokens, wrote 12" in caplog.text and "secret" not in caplog.text
    with_workers(scenario, ScriptedEngine(lambda prompt: "their secret"), log_content=True)
    assert "my secrettheir secret" in caplog.text
