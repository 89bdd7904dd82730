"""An engine in a thread of its own, with one queue of tokens per request.

The event loop sends the thread commands (begin this request, drop that one), which it executes between two steps.
After each step the thread sends all new tokens to the loop at once, where each goes into the queue of its request.
So the loop never waits for the engine, and the engine never waits for a slow client.

Nothing here knows of HTTP or text (server.py does), or of a model: `engine` is anything with the methods of
engine.Engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from nanochat.common import UserError

log = logging.getLogger(__name__)

FAILING = 3  # failed steps in a row after which an engine is reported as failing


class Busy(Exception):
    """The queue is full, or the server is shutting down."""


class EngineFailure(Exception):
    """The engine failed during generation. The cause is in the log and not shown to the client."""


@dataclass(eq=False)
class Request:
    """`n` replies to one prompt. `events` receives lists of (reply, token), or the error that ended the request."""

    prompt: list[int]
    n: int
    settings: dict
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    sequences: list = field(default_factory=list)  # the engine's, used by its thread only

    def __post_init__(self):
        self.unfinished = set(range(self.n))
        self.finish_reasons: list[str | None] = [None] * self.n


class EngineThread:
    """An engine, its thread, and the queue in front of it, in which `max_queue` replies may wait.

    `make_engine` is called in the thread and should load the model there: a second thread that uses torch gets
    OpenMP workers of its own, and with more workers than cores the products are three times as slow (dev/LOG.md, 12).
    """

    def __init__(self, make_engine: Callable[[], object], device: str = "cpu", max_queue: int = 64):
        self.device, self.max_queue = device, max_queue
        self.engine = None  # set by `start`
        # Used on the event loop
        self.loop: asyncio.AbstractEventLoop | None = None
        self.requests: set[Request] = set()
        self.counts: Counter[str] = Counter()  # requests, and of these completed, cancelled, failed
        # Used in the thread
        self.failures = 0  # failed steps in a row
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict = {}  # engine's sequence -> (request, index)
        self._made: Future = Future()
        self._thread = threading.Thread(target=self._run, args=[make_engine], name=f"engine {device}")

    def start(self) -> None:
        """Start the thread and wait for the engine; raises what its construction raised."""
        self._thread.start()
        self.engine = self._made.result()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._commands.put(None)
        if self._thread.ident:
            self._thread.join()

    # -------------------------------------------------------------------------
    # On the event loop

    @property
    def active(self) -> int:
        return sum(len(request.unfinished) for request in self.requests)

    @property
    def waiting(self) -> int:
        return max(0, self.active - self.engine.max_sequences)

    @property
    def failing(self) -> bool:
        return self.failures >= FAILING

    def submit(self, prompt: list[int], n: int = 1, **settings) -> Request:
        """Request `n` replies to a prompt; `settings` are those of `Engine.submit`. Raises Busy if the queue is full."""
        if self.active >= self.engine.max_sequences + self.max_queue:
            raise Busy("the server is busy; try again later")
        self.loop = asyncio.get_running_loop()
        request = Request(prompt, n, settings)
        self.requests.add(request)
        self.counts["requests"] += 1
        self._commands.put(partial(self._begin, request))
        return request

    async def tokens(self, request: Request) -> AsyncIterator[list[tuple[int, int | None]]]:
        """Yields lists of (reply, token) as they are generated, the token None at the end of a reply.

        Returns once all replies have ended. Raises what ended the request: UserError from the engine, or EngineFailure.
        """
        while request.unfinished or not request.events.empty():
            events = [await request.events.get()]
            while not request.events.empty():
                events.append(request.events.get_nowait())
            if tokens := [pair for event in events if isinstance(event, list) for pair in event]:
                yield tokens
            for error in events:
                if isinstance(error, Exception):
                    raise error

    def cancel(self, request: Request, replies: Iterable[int] | None = None, reason: str = "cancelled", error: Exception | None = None):
        """End some replies (None: all) and free their sequences before the next step; no effect on finished ones."""
        ended = request.unfinished & set(range(request.n) if replies is None else replies)
        if ended:
            for index in ended:
                self._finish(request, index, reason)
            request.events.put_nowait(error or [])  # wakes the reader
            self._commands.put(partial(self._drop, request, ended))

    def _finish(self, request: Request, index: int, reason: str) -> None:
        request.unfinished.remove(index)
        request.finish_reasons[index] = reason
        if not request.unfinished:
            self.requests.discard(request)
            self.counts[reason if reason in ("cancelled", "failed") else "completed"] += 1

    def _deliver(self, events: list[tuple[Request, int, int, str | None]]) -> None:
        """Put the tokens of a step into the queues of their requests."""
        tokens = defaultdict(list)
        for request, index, token, reason in events:
            if index in request.unfinished:  # otherwise it was cancelled meanwhile
                tokens[request].append((index, token))
                if reason:
                    tokens[request].append((index, None))
                    self._finish(request, index, reason)
        for request, pairs in tokens.items():
            request.events.put_nowait(pairs)

    # -------------------------------------------------------------------------
    # In the thread

    def _run(self, make_engine: Callable[[], object]) -> None:
        try:
            self._made.set_result(make_engine())
        except BaseException as error:  # raised by `start`
            self._made.set_exception(error)
            return
        while self._execute_commands():
            if self._running:
                self._step()

    def _execute_commands(self) -> bool:
        """Execute the pending commands, waiting for one if the engine is idle. Returns False after the last one."""
        while True:
            try:
                command = self._commands.get(block=not self._running)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, request: Request) -> None:
        try:
            for index in range(request.n):
                seq = self.engine.submit(request.prompt, sample_index=index, **request.settings)
                request.sequences.append(seq)
                self._running[seq] = request, index
        except UserError as error:
            self._fail(request, error)
        except Exception:
            log.exception("the engine on %s could not begin a request", self.device)
            self._fail(request, EngineFailure("the server could not begin this reply; try again"))

    def _drop(self, request: Request, indexes: set[int]) -> None:
        for index in indexes:
            if index < len(request.sequences):
                self.engine.cancel(request.sequences[index])
                self._running.pop(request.sequences[index], None)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            log.exception("the engine on %s failed; %d replies are lost", self.device, len(self._running))
            self.failures += 1
            for request in {request for request, _ in self._running.values()}:
                self._fail(request, EngineFailure("the server failed while generating this reply; try again"))
            for seq in self._running:
                self.engine.cancel(seq)
            self._running.clear()
            return
        self.failures = 0
        if events:
            self._call(self._deliver, [(*self._running[seq], token, seq.finish_reason) for seq, token, _ in events])
        for seq, _, _ in events:
            if seq.finish_reason:
                del self._running[seq]

    def _fail(self, request: Request, error: Exception) -> None:
        self._call(self.cancel, request, None, "failed", error)

    def _call(self, *call) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(*call)


class Pool:
    """One engine thread per device."""

    def __init__(self, threads: Sequence[EngineThread]):
        self.threads = list(threads)
        self.closing = False
        self.rejected = 0

    def start(self) -> None:
        """Start one after the other, so that host memory holds one model at a time on its way to a GPU."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        for thread in self.threads:
            thread.stop()

    def submit(self, prompt: list[int], n: int = 1, **settings) -> tuple[EngineThread, Request]:
        """A request to the engine with the fewest active replies. Raises Busy."""
        thread = min(self.threads, key=lambda thread: (thread.failing, thread.active))
        try:
            if self.closing:
                raise Busy("the server is shutting down; try again later")
            return thread, thread.submit(prompt, n, **settings)
        except Busy:
            self.rejected += 1
            raise

    async def drain(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests and wait for the running ones; after `grace` seconds, or when `hurry()`, these fail."""
        self.closing = True
        deadline = time.monotonic() + grace
        while any(thread.requests for thread in self.threads) and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.05)
        for thread in self.threads:
            for request in list(thread.requests):
                thread.cancel(request, None, "failed", EngineFailure("the server was shut down before this reply was complete"))
