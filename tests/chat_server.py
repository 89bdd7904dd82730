"""For the tests of the chat programs: a scripted engine, a real server around it, and programs with a saved model.

A test can hold the engine, so that each step waits for permission: no test depends on a clock.
"""

import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import httpx

from nanochat.common import UserError
from nanochat.engine_thread import EngineThread, Pool
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

# Every byte is a token; nothing is merged.
SPECIAL_IDS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
TOKENIZER = RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, SPECIAL_IDS)
END = TOKENIZER.encode_special("<|assistant_end|>")
TIMEOUT = 30  # seconds
PAGE, V1 = ROUTES = ["/chat/completions", "/v1/chat/completions"]


def tokens_of(text: str) -> list[int]:
    """Ids of a text in which special tokens, written out, are meant: "<|python_start|>1+1<|python_end|>"."""
    ids = []
    for segment in re.split(r"(<\|\w+\|>)", text):
        ids += [SPECIAL_IDS[segment]] if segment in SPECIAL_IDS else TOKENIZER.encode(segment)
    return ids


def message(content="hi", role="user"):
    return {"role": role, "content": content}


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    script: list[int]
    limit: int
    settings: dict
    finish_reason: str | None = None

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class ScriptedEngine:
    """The interface of engine.Engine. Generates `reply(prompt)`, one byte per step; after `hold`, steps wait for `allow`."""

    def __init__(self, reply=lambda prompt: "hello", max_sequences: int = 4, context: int = 400):
        self.reply, self.max_sequences, self.context = reply, max_sequences, context
        self.tokenizer, self.terminal_tokens = TOKENIZER, frozenset([END])
        self.prefill_tokens = self.cached_tokens = self.generated_tokens = 0
        self.seqs: list[Sequence] = []
        self.submitted: list[Sequence] = []
        self.error: Exception | None = None  # raised by the next step
        self.in_step, self.dropped = threading.Event(), threading.Event()
        self._permits: threading.Semaphore | None = None

    def hold(self) -> None:
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        if self._permits:
            permits, self._permits = self._permits, None
            permits.release()

    @property
    def num_running(self) -> int:
        return min(len(self.seqs), self.max_sequences)

    @property
    def num_waiting(self) -> int:
        return len(self.seqs) - self.num_running

    def submit(self, tokens, max_tokens=None, **settings) -> Sequence:
        prompt = TOKENIZER.decode(tokens)
        if "refuse me" in prompt:
            raise UserError("the engine refuses this")
        limit = len(tokens) + min(max_tokens or self.context, self.context - len(tokens))
        seq = Sequence(list(tokens), [*tokens_of(self.reply(prompt)), END], limit, settings)
        self.seqs.append(seq)
        self.submitted.append(seq)
        return seq

    def cancel(self, seq: Sequence) -> None:
        if seq in self.seqs:
            self.seqs.remove(seq)
            seq.finish_reason = "cancelled"
            self.dropped.set()

    def step(self) -> list[tuple[Sequence, int, int]]:
        self.in_step.set()
        if self._permits:
            assert self._permits.acquire(timeout=TIMEOUT)
        if self.error:
            error, self.error, self.seqs = self.error, None, []
            raise error
        events = []
        for seq in self.seqs[: self.max_sequences]:
            seq.tokens.append(seq.script[len(seq.generated)])
            self.generated_tokens += 1
            if seq.tokens[-1] == END:
                seq.finish_reason = "stop"
            elif len(seq.tokens) >= seq.limit:
                seq.finish_reason = "context" if seq.limit == self.context else "length"
            events.append((seq, seq.tokens[-1], 1))
        self.seqs = [seq for seq in self.seqs if not seq.finish_reason]
        return events


class Site:
    """A running server and a client of it."""

    def __init__(self, address: str, engine, pool: Pool, server):
        self.address, self.engine, self.pool, self.server = address, engine, pool, server
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)
        self.get = self.client.get

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def ask(self, text: str = "hi", path: str = PAGE, **settings) -> httpx.Response:
        return self.post(path, messages=[message(text)], **settings)

    def open(self, text: str = "hi", path: str = PAGE, **settings):
        """A stream, as a context manager that disconnects at its end."""
        return self.client.stream("POST", path, json={"messages": [message(text)], **settings})


def events_in(lines) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]


def events_of(response: httpx.Response) -> list[dict]:
    """The events of a complete stream, whose form is checked."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") and "\n" not in line for line in response.text.removesuffix("\n\n").split("\n\n"))
    assert response.text.endswith("\n\n")
    return events_in(response.text.split("\n\n"))


def joined(segments) -> list[tuple[str, str]]:
    """[(kind, text), ...] with neighbours of a kind joined."""
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(segments, key=lambda segment: segment[0])]


def segments_of(response: httpx.Response) -> list[tuple[str, str]]:
    """A reply of the page's route as [(kind, text), ...]."""
    return joined((event["type"], event["token"]) for event in events_of(response) if "token" in event)


@contextmanager
def serving(*engines, max_queue: int = 64, grace: float = TIMEOUT, **defaults):
    """A Site whose server has these engines, one thread each."""
    from nanochat.server import make_app
    from scripts.chat_web import listen, make_server

    pool = Pool([EngineThread(lambda engine=engine: engine, f"fake:{i}", max_queue) for i, engine in enumerate(engines)])
    pool.start()
    sock = listen("127.0.0.1", 0)
    server = make_server(make_app(pool, "sft d2 step 8", **defaults), pool, sock, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    site = Site(f"http://127.0.0.1:{sock.getsockname()[1]}", engines[0], pool, server)
    try:
        yield site
    finally:
        site.client.close()
        server.should_exit = True
        thread.join(TIMEOUT)
        pool.stop()
        assert not thread.is_alive()


def save_model(model, *stages: str) -> None:
    """Save a model as d2 of these stages at step 5, in the base folder."""
    import torch

    from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
    from nanochat.common import Compute

    meta, compute = {"model_config": vars(model.config)}, Compute(torch.device("cpu"), torch.float32)
    for stage in stages:
        save_checkpoint(checkpoint_dir(stage, "d2"), 5, model.state_dict(), None, meta, TOKENIZER, compute)


@contextmanager
def program(*command: str):
    """A script in a process of its own, with pipes of bytes; killed after two minutes."""
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--device-type", "cpu"], cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()
