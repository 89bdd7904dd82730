"""An engine in a thread of its own, which generates replies for an event loop.

Between two steps the thread begins new replies, and drops those that have ended because their client disconnected. After
each step it sends all new tokens to the loop at once, where each joins the pending ones of its reply. So the loop never
waits for the engine, and the engine never waits for a slow client. Nothing here knows of HTTP or text (server.py does).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.scheduler import Sequence

log = logging.getLogger(__name__)

FAILING = 3  # failed steps in a row after which an engine is reported as failing


class Busy(Exception):
    """The queue is full, or the server is shutting down."""


class EngineFailure(Exception):
    """The engine failed during generation. The cause is in the log and not shown to the client."""


@dataclass(eq=False)
class Reply:
    """A reply to a prompt, used on the event loop."""

    thread: EngineThread
    prompt: list[int]
    settings: dict
    changed: asyncio.Event  # shared by all replies to one request: there are new tokens, or one has ended
    seq: Sequence | None = None  # set in the engine's thread; its `scores` are complete before a token is sent
    pending: list[int] = field(default_factory=list)  # tokens that the server has not yet fetched
    finish_reason: str | None = None
    error: Exception | None = None  # why it "failed", if the client may see that

    def end(self, reason: str = "cancelled", error: Exception | None = None) -> None:
        """No effect if it has ended. The engine's thread frees its sequence before the next step."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.changed.set()
            self.thread.replies.remove(self)
            self.thread.counts[reason if reason in ("cancelled", "failed") else "completed"] += 1


class EngineThread:
    """An engine, its thread, and the queue in front of it, in which `max_queue` replies may wait.

    `make_engine` is called in the thread and should load the model there: a second thread that uses torch gets
    OpenMP workers of its own, and with more workers than cores the products are three times as slow (dev/LOG.md, 12).
    """

    def __init__(self, make_engine: Callable, device: str = "cpu", max_queue: int = 64):
        self.make_engine, self.device, self.max_queue = make_engine, device, max_queue
        self.engine = None  # set by `start`
        self.failures = 0  # failed steps in a row
        # Used on the event loop
        self.loop: asyncio.AbstractEventLoop | None = None
        self.replies: set[Reply] = set()  # waiting and running
        self.counts: Counter[str] = Counter()  # requests and rejected ones; completed, cancelled and failed replies
        # Used in the thread
        self._inbox: queue.SimpleQueue[list[Reply] | None] = queue.SimpleQueue()  # new replies; None: stop
        self._executor = ThreadPoolExecutor(1, f"engine {device}")
        self._running: dict[object, Reply] = {}  # by the engine's sequence

    def start(self) -> None:
        """Start the thread and wait for the engine; raises what its construction raised."""
        self.engine = self._executor.submit(self.make_engine).result()
        self._executor.submit(self._run).add_done_callback(lambda run: run.result())  # logs an unexpected end

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)
        self._executor.shutdown()

    @property
    def failing(self) -> bool:
        return self.failures >= FAILING

    def submit(self, prompts: list[list[int]], n: int = 1, **settings) -> list[Reply]:
        """Request `n` replies to each prompt; `settings` are those of `Engine.submit`. Raises Busy if the queue is full."""
        if len(self.replies) >= self.engine.max_sequences + self.max_queue:
            self.counts["rejected"] += 1
            raise Busy("the server is busy; try again later")
        self.loop, changed = asyncio.get_running_loop(), asyncio.Event()
        replies = [Reply(self, prompt, {**settings, "sample_index": index}, changed) for prompt in prompts for index in range(n)]
        self.replies.update(replies)
        self.counts["requests"] += 1
        self._inbox.put(replies)
        return replies

    # -------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        while True:
            for seq, reply in list(self._running.items()):
                if seq.finish_reason or reply.finish_reason:
                    self.engine.cancel(seq)
                    del self._running[seq]
            try:
                replies = self._inbox.get(block=not self._running)
                if replies is None:
                    return
                for reply in replies:
                    reply.seq = self.engine.submit(reply.prompt, **reply.settings)
                    self._running[reply.seq] = reply
            except queue.Empty:
                self._step()
            except Exception as error:
                self._fail(replies, error)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # the engine has ended all sequences
            self.failures += 1
            self._fail(self._running.values(), error)
        else:
            self.failures = 0
            self._send([(self._running[seq], [token], seq.finish_reason, None) for seq, token, _ in events])

    def _fail(self, replies: Iterable[Reply], error: Exception) -> None:
        """End replies. Clients see their own mistakes; other errors are only logged."""
        shown = error if isinstance(error, UserError) else None
        if not shown:
            log.error("the engine on %s failed", self.device, exc_info=error)
        self._send([(reply, [], "failed", shown) for reply in replies])

    def _send(self, events: list[tuple]) -> None:
        """Let the event loop add new tokens to their replies: (reply, tokens, finish reason, error)."""

        def deliver():
            for reply, tokens, reason, error in events:
                if reply.finish_reason is None:  # otherwise it was cancelled meanwhile
                    reply.pending += tokens
                    reply.changed.set()
                    if reason:
                        reply.end(reason, error)

        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(deliver)


class Pool:
    """One engine thread per device."""

    def __init__(self, threads: list[EngineThread]):
        self.threads, self.closing = threads, False

    def start(self) -> None:
        """Start one after the other, so that host memory holds one model at a time on its way to a GPU."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        for thread in self.threads:
            thread.stop()

    def submit(self, prompts: list[list[int]], n: int = 1, **settings) -> list[Reply]:
        """Replies of the engine that has the fewest. Raises Busy."""
        if self.closing:
            raise Busy("the server is shutting down; try again later")
        return min(self.threads, key=lambda thread: (thread.failing, len(thread.replies))).submit(prompts, n, **settings)

    async def drain(self, grace: float, hurry: Callable[[], bool]) -> None:
        """Refuse new requests and wait for the running replies; after `grace` seconds, or when `hurry()`, these fail."""
        self.closing = True
        deadline = time.monotonic() + grace
        while any(thread.replies for thread in self.threads) and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.05)
        error = EngineFailure("the server was shut down before this reply was complete")
        for reply in [reply for thread in self.threads for reply in thread.replies]:
            reply.end("failed", error)
