"""Many requests, one engine: the thread that steps it, and its interface to the event loop.

The one idea to know: an engine belongs to its thread (`EngineThread`), a request to the event loop. Two
things pass between them: orders (begin this request, drop that one), which the thread carries out between
two steps, and, once per step, everything that the step wrote for anybody. So the loop never waits for the
engine, nor the engine for a slow client.

Nothing here knows of HTTP (web.py does), of text (pieces.py does) or of a model: `engine` is anything with the
methods of engine.Engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from nanochat.common import UserError

log = logging.getLogger(__name__)

FAILING = 3  # steps that fail one after the other until a worker is said to be out of order
REMEMBERED = 4096  # conversations of which it is known which worker has read them


class Refused(Exception):
    """The queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailure(Exception):
    """The engine failed during generation. The cause is in the log and not shown to the client."""


# -----------------------------------------------------------------------------
# One request


class Answer:
    """The reply to one request: `n` sequences, whose tokens the event loop gets from `take`.

    Tokens that come faster than they are taken gather, so a slow client holds up nobody.
    """

    def __init__(self, worker: EngineThread, prompt: list[int], n: int, settings: dict):
        self.worker, self.prompt, self.n, self.settings = worker, prompt, n, settings
        self.rows = []  # the engine's; made and touched by its thread
        self.open = set(range(n))  # which rows are still being written
        self.finish_reasons = [""] * n
        self.written = 0  # tokens, over all rows, without those that only say the end
        self.error: Exception | None = None
        self.cancelled = False
        self.began = time.monotonic()
        self.first: float | None = None  # when the first token came
        self._news: list[tuple[int, int | None]] = []
        self._waiter: asyncio.Future | None = None

    async def take(self) -> list[tuple[int, int | None]]:
        """The new tokens, at least one: (sequence, token) in order, (sequence, None) when one has finished.

        [] once all rows have ended. Raises EngineFailure, or what the engine had against the request.
        """
        while not self._news and self.open:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news, self._news = self._news, []
        if self.error and not news:
            raise self.error
        return news

    def cancel(self) -> None:
        """Cancel the reply; no effect if it is complete."""
        if self.open:
            self.cancelled = True
            self._leave("cancelled")

    def finish(self, index: int) -> None:
        """Finish one sequence early."""
        if index in self.open:
            self._ended(index, "stop")
            self.worker.order(partial(self.worker.drop, self, [index]))

    def fail(self, error: Exception) -> None:
        if self.open:
            self.error = error
            self._leave("failed")

    def put(self, index: int, token: int) -> None:
        if index in self.open:  # else it was cancelled meanwhile
            self.first = self.first or time.monotonic()
            self.written += token not in self.worker.engine.terminal_tokens
            self._news.append((index, token))
            self._wake()

    def end(self, index: int, reason: str) -> None:
        if index in self.open:
            self._news.append((index, None))
            self._ended(index, reason)

    def usage(self) -> dict[str, int]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.written, "total_tokens": prompt + self.written}

    def log(self) -> None:
        """One log line without any of the conversation, or with all of it if the worker logs conversations."""
        reasons, seconds = ", ".join(self.finish_reasons), time.monotonic() - self.began
        log.info("%s: read %d tokens, wrote %d in %.2f s (%s)", self.worker.device, len(self.prompt), self.written, seconds, reasons)
        if self.worker.log_content:
            for row in self.rows:
                log.info("%s", json.dumps(self.worker.engine.tokenizer.decode(row.tokens), ensure_ascii=False))

    def _leave(self, outcome: str) -> None:
        indexes = sorted(self.open)
        for index in indexes:
            self._ended(index, outcome, outcome)
        self.worker.order(partial(self.worker.drop, self, indexes))

    def _ended(self, index: int, reason: str, outcome: str = "completed") -> None:
        self.open.remove(index)
        self.finish_reasons[index] = reason
        self.worker.note_end(self, outcome)
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


# -----------------------------------------------------------------------------
# One engine


class EngineThread:
    """An engine, its thread, and the queue in front of it.

    `make_engine` is called in that thread, and should do there all that is to be done with the model, loading
    included: a second thread that uses torch gets worker threads of its own, and when there are more of them
    than cores, OpenMP lets them sleep between any two products (a third of the speed; dev/LOG.md, 12).
    `max_queue` rows may wait when all of the engine's are taken.
    """

    def __init__(self, make_engine: Callable[[], object], device: str = "cpu", max_queue: int = 64, log_content: bool = False):
        self.device, self.max_queue, self.log_content = device, max_queue, log_content
        self.engine = None  # from `start` on
        # The event loop's:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.active = 0  # rows that were asked for and have not ended
        self.answers: set[Answer] = set()
        self.counts: Counter[str] = Counter()
        self.seconds = 1.0  # how long an answer takes to write, lately
        # The thread's:
        self.failures = 0  # one after the other
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writing: dict = {}  # row -> (answer, index)
        self._made: Future = Future()
        self._thread = threading.Thread(target=self._run, args=[make_engine], name=f"engine {device}", daemon=False)

    def start(self) -> None:
        """Start the thread and wait for the engine; raises what its construction raised."""
        self._thread.start()
        self.engine = self._made.result()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)
        if self._thread.ident:
            self._thread.join()

    # -------------------------------------------------------------------------
    # On the event loop

    @property
    def waiting(self) -> int:
        return max(0, self.active - self.engine.max_sequences)

    @property
    def full(self) -> bool:
        return self.active >= self.engine.max_sequences and self.waiting >= self.max_queue

    @property
    def failing(self) -> bool:
        return self.failures >= FAILING

    def submit(self, prompt: list[int], n: int = 1, **settings) -> Answer:
        """Request `n` replies to a prompt; `settings` are those of `Engine.submit`. Raises Refused if the queue is full."""
        if self.full:
            rounds = (self.waiting + n) / self.engine.max_sequences  # in which everybody before this request is done
            raise Refused("the server is busy; try again a little later", min(60, max(1, math.ceil(rounds * self.seconds))))
        self.loop = asyncio.get_running_loop()
        answer = Answer(self, prompt, n, settings)
        self.active += n
        self.answers.add(answer)
        self.counts["requests"] += 1
        self.order(partial(self._begin, answer))
        return answer

    def order(self, work: Callable[[], None]) -> None:
        """Send the thread a command, executed between two steps."""
        self._inbox.put(work)

    def note_end(self, answer: Answer, outcome: str) -> None:
        self.active -= 1
        if answer.open:
            return
        self.answers.discard(answer)
        self.counts[outcome] += 1
        if answer.first:
            self.seconds += 0.1 * (time.monotonic() - answer.first - self.seconds)

    def _deliver(self, tokens: list[tuple[Answer, int, int]], ended: list[tuple[Answer, int, str]]) -> None:
        for answer, index, token in tokens:
            answer.put(index, token)
        for answer, index, reason in ended:
            answer.end(index, reason)

    # -------------------------------------------------------------------------
    # In the thread

    def _run(self, make_engine: Callable[[], object]) -> None:
        try:
            self._made.set_result(make_engine())
        except BaseException as error:  # whatever it is, whoever waits for it gets it
            self._made.set_exception(error)
            return
        while self._obey():
            if self._writing:
                self._step()

    def _obey(self) -> bool:
        """Execute the pending commands, waiting for one if the engine is idle. Returns False after the last one."""
        while True:
            try:
                work = self._inbox.get(block=not self._writing)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()

    def _begin(self, answer: Answer) -> None:
        try:
            for index in range(answer.n):
                row = self.engine.submit(answer.prompt, sample_index=index, **answer.settings)
                answer.rows.append(row)
                self._writing[row] = answer, index
        except UserError as error:
            self._tell(answer.fail, error)
        except Exception:
            log.exception("the engine on %s failed to take a request", self.device)
            self._tell(answer.fail, EngineFailure("the server failed to begin this answer; try again"))

    def drop(self, answer: Answer, indexes: list[int]) -> None:
        for row in [answer.rows[index] for index in indexes if index < len(answer.rows)]:
            self.engine.cancel(row)
            self._writing.pop(row, None)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            log.exception("the engine on %s failed; the %d answers in the making are lost", self.device, len(self._writing))
            self.failures += 1
            error = EngineFailure("the server failed while it wrote this answer; try again")
            for answer in dict.fromkeys(answer for answer, _ in self._writing.values()):
                self._tell(answer.fail, error)
            for row in self._writing:
                self.engine.cancel(row)
            self._writing.clear()
            return
        self.failures = 0
        tokens = [(*self._writing[row], token) for row, token, _ in events]
        ended = [(*self._writing.pop(row), row.finish_reason) for row in dict.fromkeys(row for row, _, _ in events) if row.finish_reason]
        if tokens:
            self._tell(self._deliver, tokens, ended)

    def _tell(self, *call) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is gone, and nobody listens
            self.loop.call_soon_threadsafe(*call)


# -----------------------------------------------------------------------------
# Several engines


class Workers:
    """All engines: routing of requests, start and shutdown."""

    def __init__(self, threads: Sequence[EngineThread]):
        self.threads = list(threads)
        self.closing = False
        self.rejected = 0
        self._home: OrderedDict[int, EngineThread] = OrderedDict()  # conversation's hash -> who has it in its cache

    def start(self) -> None:
        """One after the other, so that only one model at a time is in host memory on its way to a GPU."""
        for thread in self.threads:
            thread.start()

    @property
    def tokenizer(self):
        return self.threads[0].engine.tokenizer

    @property
    def context(self) -> int:
        return self.threads[0].engine.context

    def submit(self, conversation: str, prompt: list[int], n: int = 1, **settings) -> Answer:
        """See EngineThread.submit. Requests with the same `conversation` go to the same worker if possible."""
        try:
            if self.closing:
                raise Refused("the server is shutting down; try again when it is back", 10)
            key = hash(conversation)
            answer = self._choose(key).submit(prompt, n, **settings)
        except Refused:
            self.rejected += 1
            raise
        self._home[key] = answer.worker
        self._home.move_to_end(key)
        while len(self._home) > REMEMBERED:
            self._home.popitem(last=False)
        return answer

    def _choose(self, key: int) -> EngineThread:
        idlest = min(self.threads, key=lambda thread: (thread.failing, thread.active))
        home = self._home.get(key, idlest)
        # Reading a conversation anew costs less than waiting behind a quarter of all rows.
        return idlest if home.failing or home.full or home.active > idlest.active + home.engine.max_sequences // 4 else home

    def counts(self) -> Counter[str]:
        return sum((thread.counts for thread in self.threads), Counter())

    async def drain(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Accept no new requests and wait until all replies are complete; after `grace` seconds they fail."""
        self.closing = True
        deadline = time.monotonic() + grace
        while any(thread.answers for thread in self.threads) and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.05)
        for answer in [answer for thread in self.threads for answer in thread.answers]:
            answer.fail(EngineFailure("the server was shut down before this answer was complete"))

    def stop(self) -> None:
        for thread in self.threads:
            thread.stop()
