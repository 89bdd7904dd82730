"""For the tests of the web server: a scripted engine, and a real server around it.

A test can hold the engine, so that each step waits for permission: no test depends on a clock.
"""

import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from nanochat.common import UserError
from nanochat.engine_thread import EngineThread, Pool
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

# Every byte is a token; nothing is merged.
TOKENIZER = RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})
END = TOKENIZER.encode_special("<|assistant_end|>")
TIMEOUT = 30  # seconds
PAGE, V1 = ROUTES = ["/chat/completions", "/v1/chat/completions"]


def tokens_of(text: str) -> list[int]:
    """Ids of a text in which special tokens, written out, are meant: "<|python_start|>1+1<|python_end|>"."""
    pieces = re.split(r"(<\|\w+\|>)", text)
    return [id for piece in pieces for id in ([TOKENIZER.encode_special(piece)] if piece in SPECIAL_TOKENS else TOKENIZER.encode(piece))]


def message(content="hi", role="user"):
    return {"role": role, "content": content}


def answering(replies: dict[str, str]):
    """A `reply` for ScriptedEngine: the reply of the first of these words that the prompt contains, else "hello"."""
    return lambda prompt: next((text for word, text in replies.items() if word in prompt), "hello")


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
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class ScriptedEngine:
    """The interface of engine.Engine. Generates `reply(prompt)`, one byte per step; after `hold`, steps wait for `allow`."""

    def __init__(self, reply=lambda prompt: "hello", max_sequences: int = 4, context: int = 400):
        self.reply, self.max_sequences, self.context = reply, max_sequences, context
        self.tokenizer, self.terminal_tokens = TOKENIZER, frozenset([END])
        self.prefill_tokens = self.cached_tokens = self.generated_tokens = self.steps = 0
        self.seqs: list[Sequence] = []
        self.submitted: list[Sequence] = []
        self.error: Exception | None = None  # raised by the next step
        self.in_step, self.dropped = threading.Event(), threading.Event()
        self._permits: threading.Semaphore | None = None

    def hold(self) -> None:
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self._permits.release()

    def release(self) -> None:
        permits, self._permits = self._permits, None
        permits.release()

    @property
    def num_running(self) -> int:
        return min(len(self.seqs), self.max_sequences)

    @property
    def num_waiting(self) -> int:
        return len(self.seqs) - self.num_running

    @property
    def busy(self) -> bool:
        return bool(self.seqs)

    def submit(self, tokens, max_tokens=None, **settings) -> Sequence:
        prompt = TOKENIZER.decode(tokens)
        if "refuse me" in prompt:
            raise UserError("the engine refuses this")
        script = self.reply(prompt)
        script = script if isinstance(script, list) else [*tokens_of(script), END]
        seq = Sequence(list(tokens), script, len(tokens) + min(max_tokens or self.context, self.context - len(tokens)), settings)
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
        self.steps += 1
        if self.error:
            error, self.error, self.seqs = self.error, None, []
            raise error
        events = []
        for seq in self.seqs[: self.max_sequences]:
            seq.tokens.append(seq.script[len(seq.tokens) - seq.prompt_length])
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

    def __init__(self, address: str, engines: list, pool: Pool, server):
        self.address, self.engines, self.engine, self.pool, self.server = address, engines, engines[0], pool, server
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def ask(self, text: str = "hi", path: str = "/chat/completions", **settings) -> httpx.Response:
        return self.post(path, messages=[{"role": "user", "content": text}], **settings)

    def open(self, text: str = "hi", path: str = "/chat/completions", **settings):
        """A stream, as a context manager that disconnects at its end."""
        return self.client.stream("POST", path, json={"messages": [{"role": "user", "content": text}], **settings})


def events_of(response: httpx.Response) -> list[dict]:
    """The events of a complete stream, whose form is checked."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    text = response.content.decode()
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def segments_of(response: httpx.Response) -> list[tuple[str, str]]:
    """A reply of the page's route as [(kind, text), ...], neighbours of a kind joined."""
    joined: list[tuple[str, str]] = []
    for event in events_of(response):
        if "token" in event:
            same = joined and joined[-1][0] == event["type"]
            joined[-1:] = [(event["type"], joined[-1][1] + event["token"])] if same else [*joined[-1:], (event["type"], event["token"])]
    return joined


@contextmanager
def serving(*engines, max_queue: int = 64, grace: float = TIMEOUT, **defaults):
    """A Site whose server has these engines, one thread each."""
    from nanochat.server import make_app
    from scripts.chat_web import listen, make_server

    pool = Pool([EngineThread(lambda engine=engine: engine, f"fake:{i}", max_queue) for i, engine in enumerate(engines)])
    pool.start()
    sock = listen("127.0.0.1", 0)
    sock.listen()  # clients can connect before the server is ready
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = make_server(make_app(pool, "sft d2 step 8", **defaults), pool, sock, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    site = Site(address, list(engines), pool, server)
    try:
        yield site
    finally:
        site.client.close()
        server.should_exit = True
        thread.join(TIMEOUT)
        pool.stop()
        assert not thread.is_alive()
