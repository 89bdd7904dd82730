"""OpenAI's chat completions API, as far as a model like ours supports it.

The one idea to know: it is a translation. A request becomes a prompt and settings for the engine, and what
is written becomes the objects that OpenAI's clients read. Fields that mean nothing here are ignored.
A reply's text is its text parts alone: calls of the calculator and what it answered are left out.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints

from nanochat.conversation import render_for_completion
from nanochat.pieces import Pieces
from nanochat.serving import Answer, Workers
from nanochat.web import ERRORS, EVENTS, MAX_MESSAGES, ApiError, EventStream, RequestModel, error_event, while_wanted

REASONS = {"stop": "stop", "length": "length", "context": "length"}
StopString = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class CompletionRequest(RequestModel):
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=8)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=200, description="not OpenAI's; 0: all")
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def add_routes(app: FastAPI, workers: Workers, name: str, defaults: dict) -> None:
    """`name` is the model's, as in "sft d4 step 60"; `defaults` are the settings that a request may omit."""
    model_id = name.replace(" ", "-")
    card = {"id": model_id, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    def check_model(asked: str | None) -> None:
        """Any prefix of our name is accepted ("sft", "sft-d4"), and "nanochat"."""
        if asked and asked not in ("nanochat", name) and not f"{model_id}-".startswith(f"{asked}-"):
            message = f"the model {asked[:100]!r} does not exist; use {model_id!r}, or omit `model`"
            raise ApiError(404, message, param="model", code="model_not_found")

    @app.get("/v1/models", responses=ERRORS)
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{id:path}", responses=ERRORS)
    async def model(id: str):
        check_model(id)
        return card

    @app.post("/v1/chat/completions", responses=EVENTS | ERRORS)
    async def completions(request: Request, body: CompletionRequest):
        check_model(body.model)
        messages = [message.plain() for message in body.messages]
        if messages[-1]["role"] != "user":
            raise ApiError(400, "the last message must have the role 'user'", param=f"messages[{len(messages) - 1}].role")
        prompt = await asyncio.to_thread(render_for_completion, workers.tokenizer, {"messages": messages})
        if len(prompt) >= workers.context:
            message = f"the messages have {len(prompt)} tokens, and the model's context of {workers.context} must hold them and the answer"
            raise ApiError(400, f"{message}; shorten them", param="messages", code="context_length_exceeded")
        given = body.model_dump(include={"temperature", "top_k"}, exclude_none=True)
        answer = workers.submit(
            next(message["content"] for message in messages if message["role"] == "user"),
            prompt,
            n=body.n or 1,
            max_tokens=body.max_completion_tokens or body.max_tokens or defaults["max_tokens"],
            temperature=given.get("temperature", defaults["temperature"]),
            top_k=given.get("top_k", defaults["top_k"]) or None,
            top_p=body.top_p or 1.0,
            seed=secrets.randbits(31) if body.seed is None else body.seed,
            stop=tuple(body.stops()),
        )
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()), "model": model_id}
        texts = texts_of(answer, workers, body.stops())
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(chunks(answer, texts, {**head, "object": "chat.completion.chunk"}, include_usage), answer)
        contents = [[] for _ in range(answer.n)]
        async with while_wanted(request.receive, answer):
            async for news in texts:
                for index, text in news:
                    contents[index].append(text)
        if answer.cancelled:
            return Response(status_code=499)  # which nobody will read
        choices = [choice(index, REASONS[reason], message={"role": "assistant", "content": "".join(content), "refusal": None})
                   for index, (content, reason) in enumerate(zip(contents, answer.finish_reasons))]
        return JSONResponse({**head, "choices": choices, "usage": answer.usage()})


async def texts_of(answer: Answer, workers: Workers, stop: list[str]):
    """Yields lists of (choice, text) as the reply is generated, without tool calls and without stop strings and what follows them."""
    rows = [Pieces(workers.tokenizer, stop) for _ in range(answer.n)]
    while news := await answer.take():
        texts = []
        for index, token in news:
            row = rows[index]
            texts += [(index, text) for kind, text in (row.finish() if token is None else row.push(token)) if kind == "text"]
            if row.stopped:
                answer.finish(index)
        yield texts


async def chunks(answer: Answer, texts, head: dict, include_usage: bool):
    """The events of a stream. Most differ in their text only, so the JSON around it is built once."""
    usage = {"usage": None} if include_usage else {}

    def event(**fields) -> str:
        return f"data: {json.dumps({**head, **usage, **fields})}\n\n"

    mark = "\0text\0"
    around = [event(choices=[choice(index, None, delta={"content": mark})]).split(json.dumps(mark)) for index in range(answer.n)]
    yield "".join(event(choices=[choice(i, None, delta={"role": "assistant", "content": ""})]) for i in range(answer.n)).encode()
    try:
        async for news in texts:
            if news:
                yield "".join(f"{around[index][0]}{json.dumps(text)}{around[index][1]}" for index, text in news).encode()
    except Exception as error:
        yield error_event(error).encode()
        return
    if answer.cancelled:
        return
    last = [event(choices=[choice(index, REASONS[reason], delta={})]) for index, reason in enumerate(answer.finish_reasons)]
    if include_usage:
        last.append(event(choices=[], usage=answer.usage()))
    yield "".join([*last, "data: [DONE]\n\n"]).encode()


def choice(index: int, finish_reason: str | None, **said) -> dict:
    """One of the `n` choices: complete (`message=`) or a delta (`delta=`)."""
    return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}
