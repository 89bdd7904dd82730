"""For the tests of the chat programs: a scripted engine, a real server around it, and programs with a saved model.

A test can hold the engine, so that each step waits for permission: no test depends on a clock.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from itertools import groupby

import httpx
import openai
from conftest import ROOT
from tiny import BYTES as TOKENIZER, SPECIAL_IDS, Script

from nanochat.engine import Engine
from nanochat.engine_thread import EngineThread, Pool
from nanochat.scheduler import Sequence

END = TOKENIZER.encode_special("<|assistant_end|>")
TIMEOUT = 30  # seconds
PAGE, V1 = ROUTES = ["/chat/completions", "/v1/chat/completions"]
COMPLETIONS = "/v1/completions"
MODEL = "sft-d2-step-8"
REPLIES = {
    "emoji": "né 👩‍🚀!",
    "sums": "It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.",
    "silence": "",
    "long": "x" * 1000,
    "count": "1, 2, 3, 4, 5",
}  # by a word of the prompt


def tokens_of(text: str) -> list[int]:
    """Ids of a text in which special tokens, written out, are meant: "<|python_start|>1+1<|python_end|>"."""
    segments = re.split(r"(<\|\w+\|>)", text)
    return sum(([SPECIAL_IDS[segment]] if segment in SPECIAL_IDS else TOKENIZER.encode(segment) for segment in segments), [])


def message(content="hi", role="user"):
    return {"role": role, "content": content}


class ScriptedEngine(Engine):
    """An engine whose model replies `reply(prompt)`, a byte per step. After `hold`, each step waits for `allow`."""

    def __init__(self, reply=lambda prompt: "hello", max_sequences: int = 4, context: int = 400):
        self.script = cache(lambda prompt: [*tokens_of(reply(TOKENIZER.decode(prompt))), END])
        super().__init__(Script(self.next_token, context), TOKENIZER, max_sequences)
        self.submitted: list[Sequence] = []
        self.settings: list[dict] = []
        self.error: Exception | None = None  # raised by the next step
        self.in_step = threading.Event()
        self.permits: threading.Semaphore | None = None

    def next_token(self, tokens: list[int]) -> int:
        end = len(tokens) - tokens[::-1].index(TOKENIZER.encode_special("<|assistant_start|>"))  # of the prompt
        return self.script(tuple(tokens[:end]))[len(tokens) - end]

    def hold(self) -> None:
        self.permits = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        self.permits.release(steps)

    def release(self) -> None:
        self.permits.release(10**6)

    @property
    def prompts(self) -> list[list[int]]:
        return [seq.tokens[: seq.prompt_length] for seq in self.submitted]

    def submit(self, tokens, max_tokens=None, **settings) -> Sequence:
        self.submitted.append(super().submit(tokens, max_tokens, **settings))
        self.settings.append(settings)
        return self.submitted[-1]

    def _step(self):
        self.in_step.set()
        if self.permits:
            assert self.permits.acquire(timeout=TIMEOUT)
        if self.error:
            error, self.error = self.error, None
            raise error
        return super()._step()


class Site:
    """A running server, and a plain and OpenAI's client of it."""

    def __init__(self, address: str, engine, pool: Pool, server):
        self.address, self.engine, self.pool, self.server = address, engine, pool, server
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)
        self.get = self.client.get
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address.removeprefix("http://").split(":"), timeout=TIMEOUT)

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


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and response.json().keys() == {"error"}
    assert error["type"] == {5: "server_error", 4: "invalid_request_error"}[status // 100]
    assert 10 < len(error["message"]) < 300 and "\n" not in error["message"] and "Traceback" not in response.text
    return error


def ask(client, text="hi", **settings):
    return client.chat.completions.create(**{"model": MODEL, "messages": [message(text)], **settings})


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@contextmanager
def serving(*engines, max_queue: int = 64, grace: float = TIMEOUT, name: str = "sft d2 step 8", **options):
    """A Site whose server has these engines, one thread each."""
    from nanochat.server import make_app
    from scripts.chat_web import listen, make_server, own_names

    pool = Pool([EngineThread(lambda engine=engine: engine, f"fake:{i}", max_queue) for i, engine in enumerate(engines)])
    pool.start()
    sock = listen("127.0.0.1", 0)
    app = make_app(pool, name, **options, hosts=own_names("127.0.0.1", sock))
    server = make_server(app, pool, sock, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    site = Site(f"http://127.0.0.1:{sock.getsockname()[1]}", engines[0], pool, server)
    try:
        yield site
    finally:
        site.client.close()
        site.openai.close()
        server.should_exit = True
        thread.join(TIMEOUT)
        pool.stop()
        assert not thread.is_alive()


@contextmanager
def program(*command: str):
    """A script in a process of its own, with pipes of bytes; killed after two minutes."""
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--device-type", "cpu"], cwd=ROOT,
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
