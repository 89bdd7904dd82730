"""The HTTP server: OpenAI's chat completions API, and the route of the chat page as an adapter of it.

A request becomes a prompt and settings for the engine (engine_thread.py); its tokens become text, without cutting a
character, and the text becomes the objects that clients read. All errors have OpenAI's form,
{"error": {"message", "type", "param", "code"}}, and show nothing of our internals. The server keeps no conversation:
clients send it whole each time. The page also receives calls of the calculator and their output; OpenAI's clients
receive the text only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.datastructures import Headers
from fastapi.exceptions import HTTPException, RequestValidationError, StarletteHTTPException
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from nanochat.common import UserError
from nanochat.conversation import checked_turns, render_conversation, render_for_completion
from nanochat.engine_thread import Busy, EngineFailure, Pool, Reply, new_tokens
from nanochat.tokenizer import Segments

log = logging.getLogger(__name__)

MAX_BODY = 1_000_000  # bytes
BODY_TIMEOUT = 30  # seconds in which a body must arrive
RETRY_AFTER = 5  # seconds
SENDS_PER_SECOND = 1000  # of all streams: a send costs more than a token, so many streams send several tokens at a time
MAX_PAUSE = 0.05  # seconds between the sends of a stream
FILES = Path(__file__).resolve().parent

# The page may load nothing from elsewhere. Its script and style are inline.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


# -----------------------------------------------------------------------------
# Requests


class RequestModel(BaseModel):
    """Part of a request. Numbers must be JSON numbers, without NaN and infinity; unknown fields are ignored.

    Lists fail at their first error: to report each of half a million would stop the event loop for seconds.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Part(RequestModel):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=200, fail_fast=True)]

    def plain(self) -> dict:
        """The message as conversation.py expects it: the parts of a user's message are joined by newlines."""
        content = self.content
        if isinstance(content, list) and self.role == "assistant":
            content = [part.model_dump() for part in content]
        elif isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(RequestModel):
    include_usage: bool | None = None


StopString = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class ChatRequest(RequestModel):
    """The body of both routes. The page's replies are always one stream, so it needs none of the last five fields."""

    messages: list[Message] = Field(min_length=1, max_length=500, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=200)  # 0: all tokens
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=8)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)


class Guard:
    """Middleware that refuses requests for other hosts or of ambiguous length, and bodies that are too large or never end.

    `hosts` are the names of the server, as in the Host header; empty if any name may be one. A web page can make its own
    name resolve to 127.0.0.1 and would then be of the same origin as the server (DNS rebinding).
    """

    def __init__(self, app, hosts: Collection[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        size, complete, deadline = 0, False, time.monotonic() + BODY_TIMEOUT
        close = {"Connection": "close"}  # the rest of the body is not read
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts and host and host not in self.hosts:
            message = f"this server is not {host[:100]!r}; use http://localhost, or start it with another --host"
            return await as_response(ApiError(403, message, headers=close))(scope, receive, send)
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may go by the other one
            message = "a request must not have both Content-Length and Transfer-Encoding"
            return await as_response(ApiError(400, message, headers=close))(scope, receive, send)

        async def limited():
            nonlocal size, complete
            if complete:  # what is awaited now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(408, f"the request body was incomplete after {BODY_TIMEOUT} s", headers=close) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                raise ApiError(413, f"the request body is larger than {MAX_BODY:,} bytes; send a shorter conversation", headers=close)
            return message

        await self.app(scope, limited, send)


def fit(tokenizer, messages: list[dict], context: int, max_tokens: int | None = None) -> tuple[list[int], int]:
    """(prompt, number of dropped exchanges) for a reply to a conversation, which checks all messages.

    The prompt ends where the reply starts, or at the end of a last assistant message, which is continued. With
    `max_tokens`, as few exchanges as possible are dropped to leave room for such a reply. An exchange is a user message
    and its answer; the system message is kept.
    """
    head, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)

    longest = max(map(len, tokenizer.ranks))  # bytes of a token

    def prompt_without(exchanges: int) -> list[int] | range:
        """Of what is far too long, a range of the least length that it may have: to encode megabytes takes seconds."""
        conversation = {"messages": head + turns[2 * exchanges :]}
        texts = (text for _, parts in checked_turns(conversation) for _, text in parts)
        if (least := sum(map(len, texts)) // longest) > 4 * context:
            return range(least)
        if messages[-1]["role"] == "assistant":
            return render_conversation(tokenizer, conversation, max_tokens=None)[0][:-1]  # without its end token
        return render_for_completion(tokenizer, conversation)

    room = context - 1 - min(max_tokens or 0, context // 4)
    droppable = (len(turns) - 1) // 2 if max_tokens else 0
    prompt, dropped = prompt_without(0), 0
    if len(prompt) > room:
        dropped = bisect_left(range(droppable), True, key=lambda exchanges: len(prompt_without(exchanges)) <= room)
        prompt = prompt_without(dropped)
    if len(prompt) > room:
        least = "at least " if isinstance(prompt, range) else ""
        message = f"the messages have {least}{len(prompt)} tokens, and the context of {context} must hold them and the reply"
        raise ApiError(400, f"{message}; keep them below {room + 1}", param="messages", code="context_length_exceeded")
    return prompt, dropped


# -----------------------------------------------------------------------------
# Errors


class ApiError(HTTPException):
    """An error as it is shown to the client; `detail` is the body of the response."""

    def __init__(self, status: int, message: str, type="invalid_request_error", param=None, code=None, headers=None):
        super().__init__(status, {"error": {"message": message, "type": type, "param": param, "code": code}}, headers)


def as_api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(503, str(error), "server_busy", headers={"Retry-After": str(RETRY_AFTER)})
        case EngineFailure():
            return ApiError(500, str(error), "server_error")
        case UserError():
            message = re.match(r"messages\[\d+\]", str(error))
            return ApiError(400, str(error), param=message and message[0])
        case RequestValidationError():
            # For a field that may be a string or a list, pydantic reports both; the most specific error is the useful one
            general = ("string_type", "list_type")
            return invalid(max(error.errors(), key=lambda item: (len(item["loc"]), item["type"] not in general)))
        case StarletteHTTPException():  # the base class of FastAPI's own
            message = "unknown URL; GET /openapi.json lists the routes" if error.status_code == 404 else error.detail
            return ApiError(error.status_code, message, headers=error.headers)
    # uvicorn closes the connection after an unexpected error
    message = "internal server error; the server's log has the details"
    return ApiError(500, message, "server_error", headers={"Connection": "close"})


def as_response(error: Exception) -> JSONResponse:
    shown = as_api_error(error)
    return JSONResponse(shown.detail, shown.status_code, shown.headers)


def invalid(problem: dict) -> ApiError:
    """The error for a failed validation by pydantic.

    {"loc": ("body", "messages", 3, "content"), "msg": "Input should be ..."} -> "messages[3].content: it should be ..."
    """
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']} at character {problem['loc'][1]}")
    # The rest of `loc` are names of pydantic's own, such as "list[constrained-str]"
    names = [name for name in problem["loc"][1:] if isinstance(name, int) or re.fullmatch(r"[a-z]\w*", name) and name != "str"]
    if not names:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    text = problem["msg"].replace("Input should", "it should", 1).replace(" after validation", "")
    return ApiError(400, f"{param}: {text}", param=param)


# -----------------------------------------------------------------------------
# Replies


class Generation:
    """The replies to one request as text, and their statistics."""

    def __init__(self, replies: list[Reply], stop: list[str]):
        self.replies, self.stop = replies, stop
        self.thread, self.start = replies[0].thread, time.monotonic()
        self.completion_tokens = 0  # of all replies, without terminal tokens

    @property
    def finish_reasons(self) -> list[str]:
        return [reply.finish_reason for reply in self.replies]

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = len(self.replies[0].prompt), self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def segments(self):
        """Yields lists of (index of the reply, kind, text). Raises what ended the request."""
        engine = self.thread.engine
        texts = [Segments(engine.tokenizer, self.stop) for _ in self.replies]
        async for tokens in new_tokens(self.replies):
            segments = []
            for index, token in tokens:
                if not texts[index].stopped:
                    self.completion_tokens += token not in engine.terminal_tokens
                    segments += [(index, *segment) for segment in texts[index].push(token)]
                    if texts[index].stopped:
                        self.replies[index].end("stop")
            yield segments
        yield [(index, *segment) for index, text in enumerate(texts) for segment in text.finish()]

    @asynccontextmanager
    async def until_disconnect(self, receive):
        """Ends the replies when the client disconnects, and in any case at the end. Logs a line without content."""

        def cancel():
            for reply in self.replies:
                reply.end()

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            cancel()
            log.info("%s: %d prompt tokens, %d generated in %.2f s (%s)", self.thread.device, len(self.replies[0].prompt),
                     self.completion_tokens, time.monotonic() - self.start, ", ".join(self.finish_reasons))  # fmt: skip


class EventStream(StreamingResponse):
    """Server-sent events from an async iterator, while the client is connected. An error is the last event."""

    media_type = "text/event-stream"

    def __init__(self, events, generation: Generation):
        super().__init__(self.until_error(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.generation = generation

    async def __call__(self, scope, receive, send):
        async with self.generation.until_disconnect(receive):
            await self.stream_response(send)

    async def until_error(self, events):
        try:
            async for text in events:
                if text:
                    yield text
                await asyncio.sleep(min(MAX_PAUSE, len(self.generation.thread.replies) / SENDS_PER_SECOND))
        except Exception as error:
            if not isinstance(error, EngineFailure):  # which the engine's thread has logged
                log.error("a stream failed", exc_info=error)
            yield event(as_api_error(error).detail)


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def page_events(generation: Generation, dropped: int):
    async for segments in generation.segments():
        yield "".join(event({"token": text, "type": kind}) for _, kind, text in segments)
    yield event({"done": True, "finish_reason": generation.finish_reasons[0], "usage": generation.usage, "forgotten": dropped})


def choice(index: int, finish_reason: str | None, **content) -> dict:
    """One of OpenAI's `n` choices: complete (`message=`) or a delta (`delta=`)."""
    reason = "length" if finish_reason == "context" else finish_reason
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


async def chunks(generation: Generation, head: dict, include_usage: bool):
    """The events of a streamed completion."""

    def chunk(index: int, finish_reason: str | None = None, **delta) -> str:
        return event({**head, "choices": [choice(index, finish_reason, delta=delta)]})

    if include_usage:
        head = {**head, "usage": None}
    yield "".join(chunk(index, role="assistant", content="") for index in range(len(generation.replies)))
    async for segments in generation.segments():
        yield "".join(chunk(index, content=text) for index, kind, text in segments if kind == "text")
    yield "".join(chunk(index, reason) for index, reason in enumerate(generation.finish_reasons))
    if include_usage:
        yield event({**head, "choices": [], "usage": generation.usage})
    yield "data: [DONE]\n\n"


async def completion(generation: Generation, head: dict) -> dict:
    """A completion that is not streamed."""
    texts = [""] * len(generation.replies)
    async for segments in generation.segments():
        for index, kind, text in segments:
            texts[index] += text if kind == "text" else ""
    choices = [choice(index, reason, message={"role": "assistant", "content": texts[index], "refusal": None})
               for index, reason in enumerate(generation.finish_reasons)]  # fmt: skip
    return {**head, "choices": choices, "usage": generation.usage}


# -----------------------------------------------------------------------------
# The app


def make_app(
    pool: Pool, name: str, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512, examples: Sequence[str] = (),
    hosts: Collection[str] = (),
):  # fmt: skip
    """The FastAPI app. `pool` has been started; `name` is the model's, as in "sft d4 step 60"; `examples` are for the page.

    `hosts`: see Guard.
    """
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, hosts=hosts)
    tokenizer, context = pool.threads[0].engine.tokenizer, pool.threads[0].engine.context
    defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
    model_id = name.replace(" ", "-")
    started = time.monotonic()
    card = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    async def send_error(request: Request, error: Exception) -> JSONResponse:
        return as_response(error)

    for kind in (Busy, UserError, RequestValidationError, StarletteHTTPException, EngineFailure, Exception):
        app.add_exception_handler(kind, send_error)

    async def generate(body: ChatRequest, limit: int | None = None) -> tuple[Generation, int]:
        """(the replies, the number of dropped exchanges); `limit` as in `fit`. Raises Busy."""
        messages = [message.plain() for message in body.messages]
        prompt, dropped = await asyncio.to_thread(fit, tokenizer, messages, context, limit)
        settings = defaults | body.model_dump(include={"temperature", "top_k", "max_tokens", "top_p"}, exclude_none=True)
        settings["top_k"] = settings["top_k"] or None
        settings["seed"] = secrets.randbits(31) if body.seed is None else body.seed
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return Generation(pool.submit(prompt, body.n or 1, **settings), stop), dropped

    def check_model(requested: str | None) -> None:
        if requested not in (None, "", "nanochat", model_id):
            message = f"the model {requested[:100]!r} does not exist; use {model_id!r}, or omit `model`"
            raise ApiError(404, message, param="model", code="model_not_found")

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(FILES / "ui.html", headers=PAGE_HEADERS)

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return FileResponse(FILES / "logo.svg", headers=PAGE_HEADERS)

    @app.post("/chat/completions", response_class=Response)
    async def chat(body: ChatRequest):
        body.n = 1
        generation, dropped = await generate(body, body.max_tokens or max_tokens)
        return EventStream(page_events(generation, dropped), generation)

    @app.post("/v1/chat/completions")
    async def completions(request: Request, body: ChatRequest):
        check_model(body.model)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        generation, _ = await generate(body)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        head = {"id": id, "object": "chat.completion", "created": int(time.time()), "model": model_id}
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = chunks(generation, {**head, "object": "chat.completion.chunk"}, include_usage)
            return EventStream(events, generation)
        async with generation.until_disconnect(request.receive):
            return await completion(generation, head)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{id:path}")
    async def model(id: str):
        check_model(id)
        return card

    @app.get("/health")
    async def health():
        status = "shutting down" if pool.closing else "failing" if any(thread.failing for thread in pool.threads) else "ok"
        waiting = sum(thread.num_waiting for thread in pool.threads)
        running = sum(len(thread.replies) for thread in pool.threads) - waiting
        report = {"status": status, "ready": status == "ok", "model": name, "context": context, "running": running,
                  "waiting": waiting, "defaults": defaults, "examples": list(examples)}  # fmt: skip
        return JSONResponse(report, 200 if status == "ok" else 503)

    @app.get("/stats")
    async def stats():
        counts = {key: sum(thread.counts[key] for thread in pool.threads)
                  for key in ("requests", "completed", "cancelled", "failed", "rejected")}  # fmt: skip
        tokens = {key: sum(getattr(thread.engine, key) for thread in pool.threads)
                  for key in ("generated_tokens", "prefill_tokens", "cached_tokens")}  # fmt: skip
        # The engines' own counts, so that a leaked sequence would show here
        workers = [{"device": thread.device, "running": thread.engine.num_running, "waiting": thread.engine.num_waiting,
                    "max_sequences": thread.engine.max_sequences} for thread in pool.threads]  # fmt: skip
        return {"uptime_s": round(time.monotonic() - started, 1), **counts, **tokens, "workers": workers}

    return app
