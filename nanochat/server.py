"""The HTTP server: OpenAI's chat completions API, and the route of the chat page as an adapter of it.

A request becomes a prompt and settings for the engine (engine_thread.py); its tokens become text, without cutting a
character, and the text becomes the objects that clients read. All errors have OpenAI's form,
{"error": {"message", "type", "param", "code"}}, and show nothing of our internals. The server keeps no conversation:
clients send it whole each time.

Of a reply that uses the calculator, the page receives the calls and their output as well; OpenAI's clients receive the
text only. Fields that mean nothing here are ignored.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.exceptions import StarletteHTTPException as AnyHTTPException  # the base class of FastAPI's own
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from nanochat.common import UserError
from nanochat.conversation import render_conversation, render_for_completion
from nanochat.engine_thread import Busy, EngineFailure, Pool
from nanochat.tokenizer import Segments

log = logging.getLogger(__name__)

MAX_BODY = 1_000_000  # bytes
BODY_TIMEOUT = 30  # seconds without a byte of an unfinished body
RETRY_AFTER = 5  # seconds
SENDS_PER_SECOND = 1000  # of all streams: a send costs more than a token, so many streams send several tokens at a time
MAX_PAUSE = 0.05  # seconds between the sends of a stream
REASONS = {"stop": "stop", "length": "length", "context": "length"}  # ours -> OpenAI's
FILES = Path(__file__).resolve().parent

# The page may load nothing from elsewhere. Its script and style are inline.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer events


# -----------------------------------------------------------------------------
# Requests


class RequestModel(BaseModel):
    """Part of a request. Numbers must be JSON numbers, without NaN and infinity; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Part(RequestModel):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=200)]

    def plain(self) -> dict:
        """The message as conversation.py expects it; parts that are all text are joined by newlines."""
        content = self.content
        if isinstance(content, list):
            only_text = self.role != "assistant" or all(part.type == "text" for part in content)
            content = "\n".join(part.text for part in content) if only_text else [part.model_dump() for part in content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


StopString = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class PageRequest(RequestModel):
    messages: list[Message] = Field(min_length=1, max_length=500)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=200, description="0: all tokens")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class CompletionRequest(PageRequest):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=8)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)


class BodyLimit:
    """Middleware that refuses bodies that are too large or never end."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, complete = 0, False

        async def limited():
            nonlocal size, complete
            if complete:  # what is awaited now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_TIMEOUT)
            except asyncio.TimeoutError:
                raise ApiError(408, f"the request body was incomplete after {BODY_TIMEOUT} s") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                raise ApiError(413, f"the request body is larger than {MAX_BODY:,} bytes; send a shorter conversation")
            return message

        await self.app(scope, limited, send)


# -----------------------------------------------------------------------------
# Errors


class ApiError(HTTPException):
    """An error as it is shown to the client."""

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        self.type, self.param, self.code = type, param, code

    def body(self) -> dict:
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(503, str(error), "server_busy")
    if isinstance(error, UserError):
        message = re.match(r"messages\[\d+\]", str(error))
        return ApiError(400, str(error), param=message and message[0])
    if isinstance(error, RequestValidationError):
        # For a field that may be a string or a list, pydantic reports both; the most specific error is the useful one
        return invalid(max(error.errors(), key=lambda item: (len(item["loc"]), item["type"] not in ("string_type", "list_type"))))
    if isinstance(error, AnyHTTPException):
        sentences = {404: "unknown URL; GET /openapi.json lists the routes", 405: "this method is not allowed for this URL",
                     400: "the request body could not be parsed as JSON"}  # fmt: skip
        return ApiError(error.status_code, sentences.get(error.status_code, error.detail))
    if isinstance(error, EngineFailure):
        return ApiError(500, str(error), "server_error")
    return ApiError(500, "internal server error; the server's log has the details", "server_error")


def invalid(problem: dict) -> ApiError:
    """The error for a failed validation by pydantic.

    {"loc": ("body", "messages", 3, "content"), "msg": "Input should be ..."} -> "messages[3].content: it should be ..."
    """
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']} at character {problem['loc'][1]}")
    names = [name for name in problem["loc"][1:] if isinstance(name, int) or re.fullmatch(r"[a-z]\w*", name) and name != "str"]
    if not names:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    text = problem["msg"].replace("Input should", "it should", 1).replace(" after validation", "")
    return ApiError(400, f"{param}: {text}", param=param)


async def send_error(request: Request, error: Exception) -> JSONResponse:
    shown = as_api_error(error)
    headers = dict(getattr(error, "headers", None) or {})  # of a 405: the allowed methods
    if isinstance(error, Busy):
        headers["Retry-After"] = str(RETRY_AFTER)
    if shown.status_code == 500:
        headers["Connection"] = "close"  # uvicorn closes the connection after an unexpected error
    return JSONResponse(shown.body(), shown.status_code, headers)


# -----------------------------------------------------------------------------
# Replies


class Generation:
    """The replies to one request as text, and their statistics."""

    def __init__(self, pool: Pool, body: PageRequest, prompt: list[int], defaults: dict, n: int = 1):
        """Submits the request. `defaults`: temperature, top_k and max_tokens of requests that omit them. Raises Busy."""
        settings = defaults | body.model_dump(include={"temperature", "top_k", "max_tokens", "top_p"}, exclude_none=True)
        settings["top_k"] = settings["top_k"] or None
        settings["seed"] = secrets.randbits(31) if body.seed is None else body.seed
        self.stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.start = time.monotonic()
        self.completion_tokens = 0  # of all replies, without terminal tokens
        self.thread, self.request = pool.submit(prompt, n, **settings)
        self.finish_reasons = self.request.finish_reasons

    async def segments(self):
        """Yields lists of (reply, kind, text). Raises what ended the request."""
        engine = self.thread.engine
        replies = [Segments(engine.tokenizer, self.stop) for _ in range(self.request.n)]
        async for tokens in self.thread.tokens(self.request):
            segments = []
            for index, token in tokens:
                reply = replies[index]
                if not reply.stopped:
                    self.completion_tokens += token is not None and token not in engine.terminal_tokens
                    segments += [(index, *segment) for segment in (reply.finish() if token is None else reply.push(token))]
                    if reply.stopped:
                        self.thread.cancel(self.request, [index], "stop")
            yield segments

    def usage(self) -> dict[str, int]:
        prompt, completion = len(self.request.prompt), self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    @asynccontextmanager
    async def until_disconnect(self, receive, log_content: bool):
        """Cancels the request when the client disconnects, and at the end in any case. Logs a line without content."""

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            self.thread.cancel(self.request)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            self.thread.cancel(self.request)
            reasons = ", ".join(self.finish_reasons)
            log.info("%s: %d prompt tokens, %d generated in %.2f s (%s)", self.thread.device, len(self.request.prompt),
                     self.completion_tokens, time.monotonic() - self.start, reasons)  # fmt: skip
            if log_content:
                for seq in self.request.sequences:
                    log.info("%s", json.dumps(self.thread.engine.tokenizer.decode(seq.tokens), ensure_ascii=False))


class EventStream(StreamingResponse):
    """Server-sent events from an async iterator, while the client is connected. An error is the last event."""

    media_type = "text/event-stream"

    def __init__(self, events, generation: Generation, log_content: bool):
        super().__init__(events, headers=EVENT_HEADERS)
        self.generation, self.log_content = generation, log_content

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with self.generation.until_disconnect(receive, self.log_content):
            try:
                async for events in self.body_iterator:
                    await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
                    await asyncio.sleep(min(MAX_PAUSE, len(self.generation.thread.requests) / SENDS_PER_SECOND))
            except Exception as error:
                if not isinstance(error, EngineFailure):  # which the engine's thread has logged
                    log.error("a stream failed", exc_info=error)
                await send({"type": "http.response.body", "body": event(as_api_error(error).body()).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def plain_messages(body: PageRequest) -> list[dict]:
    messages = [message.plain() for message in body.messages]
    if messages[-1]["role"] == "system":
        raise ApiError(400, "the last message must have the role 'user' or 'assistant'", param=f"messages[{len(messages) - 1}].role")
    return messages


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a prompt that ends where the reply starts, or at the end of a last assistant message, which is continued."""
    if messages[-1]["role"] == "assistant":
        return render_conversation(tokenizer, {"messages": messages}, max_tokens=None)[0][:-1]  # without its end token
    return render_for_completion(tokenizer, {"messages": messages})


# -----------------------------------------------------------------------------
# The page's route


def fit(tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """(prompt, number of dropped exchanges): the longest end of a conversation that leaves room for a reply.

    An exchange is a user message and its answer; the system message is always kept.
    """
    room = context - 1 - min(max_tokens, context // 4)
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    user_start, dropped = tokenizer.encode_special("<|user_start|>"), 0
    while True:
        prompt = render_prompt(tokenizer, system + turns[2 * dropped :])
        if len(prompt) <= room:
            return prompt, dropped
        starts = [i for i, token in enumerate(prompt) if token == user_start]
        if len(starts) == 1:
            message = f"the last exchange has {len(prompt)} tokens, and the model's context of {context} must hold it and the reply"
            param = f"messages[{len(messages) - 1}].content"
            raise ApiError(400, f"{message}; keep it below {room}", param=param, code="context_length_exceeded")
        excess = len(prompt) - room
        dropped += next((k for k, start in enumerate(starts) if k and start - starts[0] >= excess), len(starts) - 1)


async def page_events(generation: Generation, dropped: int):
    async for segments in generation.segments():
        if segments:
            yield "".join(event({"token": text, "type": kind}) for _, kind, text in segments)
    if "cancelled" not in generation.finish_reasons:
        yield event({"done": True, "finish_reason": generation.finish_reasons[0], "usage": generation.usage(), "forgotten": dropped})


# -----------------------------------------------------------------------------
# OpenAI's objects


def choice(index: int, finish_reason: str | None, **content) -> dict:
    """One of the `n` choices: complete (`message=`) or a delta (`delta=`)."""
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


async def chunks(generation: Generation, head: dict, include_usage: bool):
    """The events of a streamed completion."""
    if include_usage:
        head = {**head, "usage": None}
    replies = range(generation.request.n)
    # Most chunks differ in their text only, so the JSON around it is built once
    mark = "\0text\0"
    around = [event({**head, "choices": [choice(i, None, delta={"content": mark})]}).split(json.dumps(mark)) for i in replies]
    yield "".join(event({**head, "choices": [choice(i, None, delta={"role": "assistant", "content": ""})]}) for i in replies)
    async for segments in generation.segments():
        texts = [(around[index], text) for index, kind, text in segments if kind == "text"]
        if texts:
            yield "".join(f"{before}{json.dumps(text)}{after}" for (before, after), text in texts)
    if "cancelled" not in generation.finish_reasons:
        for index, reason in enumerate(generation.finish_reasons):
            yield event({**head, "choices": [choice(index, REASONS[reason], delta={})]})
        if include_usage:
            yield event({**head, "choices": [], "usage": generation.usage()})
        yield "data: [DONE]\n\n"


async def completion(generation: Generation, head: dict) -> Response:
    """A completion that is not streamed."""
    texts = [""] * generation.request.n
    async for segments in generation.segments():
        for index, kind, text in segments:
            texts[index] += text if kind == "text" else ""
    if "cancelled" in generation.finish_reasons:
        return Response(status_code=499)  # the client has disconnected
    choices = [choice(index, REASONS[reason], message={"role": "assistant", "content": texts[index], "refusal": None})
               for index, reason in enumerate(generation.finish_reasons)]  # fmt: skip
    return JSONResponse({**head, "choices": choices, "usage": generation.usage()})


# -----------------------------------------------------------------------------
# The app


def make_app(
    pool: Pool, name: str, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512, log_content: bool = False,
    examples: Sequence[str] = (),
):  # fmt: skip
    """The FastAPI app. `pool` has been started; `name` is the model's, as in "sft d4 step 60"; `examples` are for the page."""
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimit)
    for kind in (Busy, UserError, RequestValidationError, AnyHTTPException, EngineFailure, Exception):
        app.add_exception_handler(kind, send_error)
    tokenizer, context = pool.threads[0].engine.tokenizer, pool.threads[0].engine.context
    defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
    page, logo = (FILES / "ui.html").read_bytes(), (FILES / "logo.svg").read_bytes()
    model_id = name.replace(" ", "-")
    started = time.monotonic()
    card = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    @app.get("/", include_in_schema=False)
    async def root():
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/logo.svg", include_in_schema=False)
    async def image():
        return Response(logo, media_type="image/svg+xml", headers=PAGE_HEADERS)

    @app.post("/chat/completions", response_class=Response)
    async def chat(body: PageRequest):
        prompt, dropped = await asyncio.to_thread(fit, tokenizer, plain_messages(body), context, body.max_tokens or max_tokens)
        generation = Generation(pool, body, prompt, defaults)
        return EventStream(page_events(generation, dropped), generation, log_content)

    @app.post("/v1/chat/completions")
    async def completions(request: Request, body: CompletionRequest):
        check_model(body.model)
        prompt = await asyncio.to_thread(render_prompt, tokenizer, plain_messages(body))
        if len(prompt) >= context:
            message = f"the messages have {len(prompt)} tokens, and the model's context of {context} must hold them and the reply"
            raise ApiError(400, f"{message}; shorten them", param="messages", code="context_length_exceeded")
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        generation = Generation(pool, body, prompt, defaults, body.n or 1)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()), "model": model_id}
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = chunks(generation, {**head, "object": "chat.completion.chunk"}, include_usage)
            return EventStream(events, generation, log_content)
        async with generation.until_disconnect(request.receive, log_content):
            return await completion(generation, head)

    def check_model(requested: str | None) -> None:
        """Any prefix of our name is accepted ("sft", "sft-d4"), and "nanochat"."""
        if requested and requested not in ("nanochat", name) and not f"{model_id}-".startswith(f"{requested}-"):
            message = f"the model {requested[:100]!r} does not exist; use {model_id!r}, or omit `model`"
            raise ApiError(404, message, param="model", code="model_not_found")

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
        waiting = sum(thread.waiting for thread in pool.threads)
        report = {
            "status": status, "ready": status == "ok", "model": name, "context": context,
            "running": sum(thread.active for thread in pool.threads) - waiting, "waiting": waiting, "defaults": defaults, "examples": list(examples),
        }  # fmt: skip
        return JSONResponse(report, 200 if status == "ok" else 503)

    @app.get("/stats")
    async def stats():
        engines = [thread.engine for thread in pool.threads]
        return {
            "uptime_s": round(time.monotonic() - started, 1),
            **{key: sum(thread.counts[key] for thread in pool.threads) for key in ("requests", "completed", "cancelled", "failed")},
            "rejected": pool.rejected,
            **{key: sum(getattr(engine, key) for engine in engines) for key in ("generated_tokens", "prefill_tokens", "cached_tokens")},
            # The engines' own counts, so that a leaked sequence would show here
            "workers": [
                {"device": thread.device, "running": thread.engine.num_running, "waiting": thread.engine.num_waiting,
                 "max_sequences": thread.engine.max_sequences} for thread in pool.threads
            ],
        }  # fmt: skip

    return app
