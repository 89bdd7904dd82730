"""The HTTP server: OpenAI's API for chat and completions, and the route of the chat page as an adapter of it.

A request becomes a prompt and settings for the engine (engine_thread.py); its tokens become text, without cutting a
character, and the text becomes the objects that clients read (api.py). The server keeps no conversation: clients send
it whole each time. The page also receives calls of the calculator and their output; OpenAI's clients receive the
text only.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import logging
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.datastructures import Headers
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from nanochat.api import (ApiError, ChatRequest, CompletionRequest, GenerationRequest, ScoredToken, as_api_error, as_response,
                          as_turns, chat_logprobs, completion_logprobs)  # fmt: skip
from nanochat.common import UserError
from nanochat.conversation import checked_turns, render_conversation, render_for_completion
from nanochat.engine_thread import Busy, EngineFailure, Pool, Reply
from nanochat.tokenizer import Segments

log = logging.getLogger(__name__)

MAX_BODY = 1_000_000  # bytes
MAX_BRACKETS = 50_000  # in a body: to parse a million bytes of small lists would stop the event loop for 50 ms
BODY_TIMEOUT = 30  # seconds in which a body must arrive
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


class Guard:
    """Middleware that refuses requests for other hosts, without the key or of ambiguous length, and bodies that are too large
    or never end.

    `hosts` are the names of the server, as in the Host header; empty if any name may be one. A web page can make its own
    name resolve to 127.0.0.1 and would then be of the same origin as the server (DNS rebinding). `api_key`, if not None,
    opens all but /health: as a bearer token, or as the password that a browser asks for and then sends with each request.
    """

    def __init__(self, app, hosts: Collection[str], api_key: str | None):
        self.app, self.hosts, self.api_key = app, hosts, api_key

    def authorized(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        if scheme.lower() == "basic":
            with suppress(ValueError):
                given = base64.b64decode(given).decode().partition(":")[2]
        return secrets.compare_digest(given.strip().encode(), self.api_key.encode())

    async def __call__(self, scope, receive, send):
        size, brackets, complete, deadline = 0, 0, False, time.monotonic() + BODY_TIMEOUT
        close = {"Connection": "close"}  # the rest of the body is not read
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts and host and host not in self.hosts:
            message = f"this server is not {host[:100]!r}; use http://localhost, or start it with another --host"
            return await as_response(ApiError(403, message, headers=close))(scope, receive, send)
        is_open = self.api_key is None or scope["path"] == "/health"
        if not is_open and not self.authorized(headers.get("authorization", "")):
            message = "this server needs its API key: as `api_key` of a client, or in a browser as the password of any user"
            challenge = {**close, "WWW-Authenticate": 'Basic realm="nanochat", charset="UTF-8"'}
            return await as_response(ApiError(401, message, code="invalid_api_key", headers=challenge))(scope, receive, send)
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may go by the other one
            message = "a request must not have both Content-Length and Transfer-Encoding"
            return await as_response(ApiError(400, message, headers=close))(scope, receive, send)

        async def limited():
            nonlocal size, brackets, complete
            if complete:  # what is awaited now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(408, f"the request body was incomplete after {BODY_TIMEOUT} s", headers=close) from None
            body = message.get("body", b"")
            size += len(body)
            brackets += body.count(b"[") + body.count(b"{")
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                too_large = f"the request body is larger than {MAX_BODY:,} bytes; send a shorter conversation"
                raise ApiError(413, too_large, headers=close)
            if brackets > MAX_BRACKETS:
                raise ApiError(413, f"the request body has more than {MAX_BRACKETS:,} lists and objects", headers=close)
            return message

        await self.app(scope, limited, send)


def fit(tokenizer, messages: list[dict], context: int, max_tokens: int | None = None) -> tuple[list[int], int]:
    """(prompt, number of dropped exchanges) for a reply to a conversation, which checks all messages.

    The prompt ends where the reply starts, or at the end of a last assistant message, which is continued. With
    `max_tokens`, as few exchanges as possible are dropped to leave room for such a reply. An exchange is a user message
    and its answer; the system message is kept.
    """
    head, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)

    def prompt_without(exchanges: int) -> list[int] | range:
        """Of what is far too long, a range as `far_too_long` returns it."""
        conversation = {"messages": head + turns[2 * exchanges :]}
        texts = (text for _, parts in checked_turns(conversation) for _, text in parts)
        if estimate := far_too_long(tokenizer, texts, context):
            return estimate
        if messages[-1]["role"] == "assistant":
            return render_conversation(tokenizer, conversation, max_tokens=None)[0][:-1]  # without its end token
        return render_for_completion(tokenizer, conversation)

    room = context - 1 - min(max_tokens or 0, context // 4)
    droppable = (len(turns) - 1) // 2 if max_tokens else 0
    prompt, dropped = prompt_without(0), 0
    if len(prompt) > room:
        dropped = bisect_left(range(droppable), True, key=lambda exchanges: len(prompt_without(exchanges)) <= room)
        prompt = prompt_without(dropped)
    check_length("messages", "the messages have", prompt, room, context)
    return prompt, dropped


def far_too_long(tokenizer, texts: Iterable[str], context: int) -> range | None:
    """A range of the least length in tokens of texts that are far too long: to encode megabytes takes seconds."""
    least = sum(map(len, texts)) // tokenizer.longest_token
    return range(least) if least > 4 * context else None


def check_length(param: str, subject: str, prompt: Sequence[int], room: int, context: int) -> None:
    if len(prompt) > room:
        least = "at least " if isinstance(prompt, range) else ""
        message = f"{subject} {least}{len(prompt)} tokens, and the context of {context} must hold them and the reply"
        raise ApiError(400, f"{message}; keep them below {room + 1}", param=param, code="context_length_exceeded")


def prompt_ids(tokenizer, prompt: str | list[int], context: int) -> list[int]:
    """The tokens that a completion continues: ids as they are; a text after bos, as each document in training."""
    if isinstance(prompt, str):
        prompt = far_too_long(tokenizer, [prompt], context) or tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
    check_length("prompt", "the prompt has", prompt, context - 1, context)
    if max(prompt) >= (size := tokenizer.get_vocab_size()):
        raise ApiError(400, f"prompt: token ids must be below {size}", param="prompt")
    return prompt


# -----------------------------------------------------------------------------
# Replies


class Text:
    """The text of a reply as its tokens arrive, and these tokens with their log-probabilities if the request asks for them.

    `echo_from`: where the part of the prompt begins that precedes the reply in the text (None: it does not). `silent`:
    the reply itself is left out. `terminal`: a terminal token counts among the tokens with log-probabilities; programs for
    evaluation expect one for each that was generated.
    """

    def __init__(self, reply: Reply, stop: list[str], echo_from: int | None = None, silent=False, terminal=False):
        self.reply, self.echo_from, self.silent, self.terminal = reply, echo_from, silent, terminal
        self.engine = reply.thread.engine
        self.tokenizer = self.engine.tokenizer
        self.segments = Segments(self.tokenizer, stop)
        self.received = self.completion_tokens = 0  # tokens; those that are shown and not terminal
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.end = self.taken = 0  # characters of `scored`, and of the text that was taken
        self.scored: list[ScoredToken] = []  # not yet taken

    def push(self, token: int) -> list[tuple[str, str]]:
        """The segments (kind, text) that a new token adds."""
        segments = self.prompt() if self.received == 0 and self.echo_from is not None else []
        self.received += 1
        if self.silent or self.segments.stopped:
            return segments
        is_terminal = token in self.engine.terminal_tokens
        self.completion_tokens += not is_terminal
        segments += self.segments.push(token)
        if self.segments.stopped:
            self.reply.end("stop")
        seq = self.reply.seq
        if seq.top_logprobs is not None and (self.segments.shows(token) or self.terminal and is_terminal):
            before = seq.prompt_length if seq.prompt_logprobs else 0
            self.add(token, *seq.scores[before + self.received - 1])
        return segments

    def prompt(self) -> list[tuple[str, str]]:
        """The prompt as a segment."""
        tokens = self.reply.prompt[self.echo_from :]
        for token, score in zip(tokens, self.reply.seq.scores[self.echo_from :]):  # these are none without prompt_logprobs
            self.add(token, *score)
        return [("text", self.tokenizer.decode(tokens))]

    def add(self, token: int, logprob: float | None, top: dict[int, float]) -> None:
        data = self.tokenizer.id_to_bytes(token)
        likely = {self.tokenizer.id_to_bytes(id): value for id, value in top.items()}
        self.scored.append(ScoredToken(data, self.end, logprob, likely))
        self.end += len(self.utf8.decode(data))

    def take(self, text: str, final: bool) -> list[ScoredToken]:
        """The tokens that begin in `text`, which follows the text of the last call; a `final` terminal token too."""
        self.taken += len(text)
        count = sum(token.offset < self.taken or final and not self.segments.stopped for token in self.scored)
        tokens, self.scored = self.scored[:count], self.scored[count:]
        return tokens


class Generation:
    """The replies to one request, `n` for each of its prompts, and their statistics."""

    def __init__(self, texts: list[Text], n: int, chat: bool):
        self.texts, self.n, self.chat = texts, n, chat
        self.replies = [text.reply for text in texts]
        self.thread, self.start = self.replies[0].thread, time.monotonic()

    @property
    def finish_reasons(self) -> list[str]:
        return ["length" if text.silent else text.reply.finish_reason for text in self.texts]

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(reply.prompt) for reply in self.replies[:: self.n])
        completion = sum(text.completion_tokens for text in self.texts)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def segments(self):
        """Yields lists of (index of the reply, kind, text). Raises what ended the request."""
        changed = self.replies[0].changed
        while any(reply.pending or reply.finish_reason is None for reply in self.replies):
            await changed.wait()
            changed.clear()
            new = []
            for index, text in enumerate(self.texts):
                tokens, text.reply.pending = text.reply.pending, []
                new += [(index, *segment) for token in tokens for segment in text.push(token)]
            yield new
        for reply in self.replies:
            if reply.finish_reason == "failed":
                raise reply.error or EngineFailure("the server failed while generating this reply; try again")
        yield [(index, *segment) for index, text in enumerate(self.texts) for segment in text.segments.finish()]

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
            log.info("%s: %d prompt tokens, %d generated in %.2f s (%s)", self.thread.device, self.usage["prompt_tokens"],
                     self.usage["completion_tokens"], time.monotonic() - self.start, ", ".join(self.finish_reasons))  # fmt: skip

    def choice(self, index: int, text: str, reason: str | None = None, **content) -> dict:
        """One of OpenAI's `choices`; `content` is the form that `text` has in a chat: a message or a delta."""
        tokens = self.texts[index].take(text, final=reason is not None)
        logprobs = (chat_logprobs if self.chat else completion_logprobs)(tokens) if tokens else None
        if not self.chat:
            content = {"text": text}
        reason = "length" if reason == "context" else reason
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    async def stream(self, head: dict, include_usage: bool):
        """The events of a streamed reply."""

        def chunk(index: int, text: str = "", reason: str | None = None, **delta) -> str:
            return event({**head, "choices": [self.choice(index, text, reason, delta=delta)]})

        if include_usage:
            head = {**head, "usage": None}
        if self.chat:
            yield "".join(chunk(index, role="assistant", content="") for index in range(len(self.texts)))
        async for segments in self.segments():
            yield "".join(chunk(index, text, content=text) for index, kind, text in segments if kind == "text")
        yield "".join(chunk(index, reason=reason) for index, reason in enumerate(self.finish_reasons))
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    async def complete(self, head: dict) -> dict:
        """A reply that is not streamed."""
        texts = [""] * len(self.texts)
        async for segments in self.segments():
            for index, kind, text in segments:
                texts[index] += text if kind == "text" else ""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, self.finish_reasons)):
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(self.choice(index, text, reason, message=message))
        return {**head, "choices": choices, "usage": self.usage}


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


# -----------------------------------------------------------------------------
# The app


def make_app(
    pool: Pool, name: str, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512, examples: Sequence[str] = (),
    hosts: Collection[str] = (), origins: Sequence[str] = (), api_key: str | None = None,
):  # fmt: skip
    """The FastAPI app. `pool` has been started; `name` is the model's, as in "sft d4 step 60"; `examples` are for the page.

    `hosts` and `api_key`: see Guard. Web pages of the `origins` may use the API, and those of this machine.
    """
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, hosts=hosts, api_key=api_key)
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
                       allow_origin_regex=r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")  # fmt: skip
    engine = pool.threads[0].engine
    tokenizer, context = engine.tokenizer, engine.context
    defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
    model_id = name.replace(" ", "-")
    started = time.monotonic()
    chats = not name.startswith("base ")
    card = {"object": "model", "created": int(time.time()), "owned_by": "nanochat", "max_model_len": context}
    cards = {id: {"id": id, **card} for id in (model_id, "nanochat")}

    async def send_error(request: Request, error: Exception) -> JSONResponse:
        return as_response(error)

    for kind in (Busy, UserError, RequestValidationError, StarletteHTTPException, EngineFailure, Exception):
        app.add_exception_handler(kind, send_error)

    def start(body: GenerationRequest, prompts: list[list[int]], scores: dict, **text) -> Generation:
        """Raises Busy. `scores` are the engine's settings for log-probabilities."""
        settings = defaults | body.model_dump(include={"temperature", "top_k", "max_tokens", "top_p"}, exclude_none=True) | scores
        settings["max_tokens"] = max(1, settings["max_tokens"])
        settings["top_k"] = settings["top_k"] or None
        settings["seed"] = secrets.randbits(31) if body.seed is None else body.seed
        n = body.n or 1
        texts = [Text(reply, body.stop or [], **text) for reply in pool.submit(prompts, n, **settings)]
        return Generation(texts, n, chat=isinstance(body, ChatRequest))

    async def start_chat(body: ChatRequest, scores: dict, limit: int | None = None) -> tuple[Generation, int]:
        """(the replies, the number of dropped exchanges); `limit` as in `fit`."""
        if not chats:
            raise ApiError(400, f"{name} is a base model: it does not chat; /v1/completions continues texts", param="model")
        prompt, dropped = await asyncio.to_thread(fit, tokenizer, as_turns(body.messages), context, limit)
        return start(body, [prompt], scores), dropped

    async def respond(request: Request, body: GenerationRequest, generation: Generation):
        prefix, kind = ("chatcmpl", "chat.completion") if generation.chat else ("cmpl", "text_completion")
        head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model_id}
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            head["object"] += ".chunk" if generation.chat else ""
            return EventStream(generation.stream(head, include_usage), generation)
        async with generation.until_disconnect(request.receive):
            content = await generation.complete(head)
            return await asyncio.to_thread(JSONResponse, content)  # the log-probabilities of a long prompt take a second

    def check_model(requested: str | None) -> None:
        if requested not in (None, "", *cards):
            message = f"the model {requested[:100]!r} does not exist; use {model_id!r}, or omit `model`"
            raise ApiError(404, message, param="model", code="model_not_found")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page():
        return FileResponse(FILES / "ui.html", headers=PAGE_HEADERS)

    @app.get("/logo.svg", include_in_schema=False)
    async def logo():
        return FileResponse(FILES / "logo.svg", headers=PAGE_HEADERS)

    @app.post("/chat/completions", response_class=Response)
    async def page_chat(body: ChatRequest):
        body.n = 1
        generation, dropped = await start_chat(body, {}, body.max_tokens or max_tokens)
        return EventStream(page_events(generation, dropped), generation)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest):
        check_model(body.model)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        scores = {"top_logprobs": body.top_logprobs or 0} if body.logprobs or body.top_logprobs else {}
        generation, _ = await start_chat(body, scores)
        return await respond(request, body, generation)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest):
        check_model(body.model)
        body.max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
        prompts = [await asyncio.to_thread(prompt_ids, tokenizer, prompt, context) for prompt in body.prompt]
        scores = {} if body.logprobs is None else {"top_logprobs": body.logprobs, "prompt_logprobs": bool(body.echo)}
        echo_from = int(isinstance(body.prompt[0], str)) if body.echo else None  # bos before a text is ours
        generation = start(body, prompts, scores, echo_from=echo_from, silent=body.max_tokens == 0, terminal=True)
        return await respond(request, body, generation)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{id:path}")
    async def model(id: str):
        check_model(id)
        return cards[id or model_id]

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        status = "shutting down" if pool.closing else "failing" if any(thread.failing for thread in pool.threads) else "ok"
        waiting = sum(max(0, len(thread.replies) - thread.engine.max_sequences) for thread in pool.threads)
        running = sum(len(thread.replies) for thread in pool.threads) - waiting
        report = {"status": status, "ready": status == "ok", "model": name, "chats": chats, "context": context,
                  "running": running, "waiting": waiting, "defaults": defaults, "examples": list(examples)}  # fmt: skip
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
