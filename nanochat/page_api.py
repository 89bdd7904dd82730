"""The route of the page: POST /chat/completions.

The one idea to know: the page always sends the whole conversation, and the server keeps none. What no longer
fits the model's context is forgotten from the front, exchange by exchange, and the page is told how many.
The reply streams as one event per token, which says what kind of thing it is part of: text, a call of the
calculator (python) or what that answered (python_output).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Annotated, Literal

from fastapi import FastAPI, Response
from pydantic import Field, StringConstraints

from nanochat.conversation import render_for_completion
from nanochat.pieces import Pieces
from nanochat.serving import Answer, Workers
from nanochat.web import ERRORS, EVENTS, MAX_MESSAGES, ApiError, EventStream, RequestModel, error_event

MAX_MESSAGE = 8_000  # characters
MAX_CONVERSATION = 32_000  # characters

Text = Annotated[str, StringConstraints(max_length=MAX_MESSAGE)]


class Part(RequestModel):
    type: Literal["text", "python", "python_output"]
    text: Text


class Message(RequestModel):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

class ChatRequest(RequestModel):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=200, description="0: all tokens")
    max_tokens: int | None = Field(None, ge=1, le=4096)
    seed: int | None = None


def add_routes(app: FastAPI, workers: Workers, defaults: dict) -> None:
    """`defaults`: temperature, top_k and max_tokens of requests that omit them."""

    @app.post("/chat/completions", response_class=Response, responses=EVENTS | ERRORS)
    async def chat(body: ChatRequest):
        settings = defaults | body.model_dump(include={"temperature", "top_k", "max_tokens"}, exclude_none=True)
        messages = body.model_dump()["messages"]
        if messages[-1]["role"] != "user":
            raise ApiError(400, "the last message must have the role 'user'", param=f"messages[{len(messages) - 1}].role")
        check_lengths(messages)
        prompt, forgotten = await asyncio.to_thread(fit, workers.tokenizer, messages, workers.context, settings["max_tokens"])
        answer = workers.submit(
            next(message["content"] for message in messages if message["role"] == "user"),
            prompt,
            max_tokens=settings["max_tokens"],
            temperature=settings["temperature"],
            top_k=settings["top_k"] or None,
            seed=secrets.randbits(31) if body.seed is None else body.seed,
        )
        return EventStream(events(answer, workers, forgotten), answer)


def check_lengths(messages: list[dict]) -> None:
    total = 0
    for i, content in enumerate(message["content"] for message in messages):
        length = len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        total += length
        if length > MAX_MESSAGE:
            message = f"messages[{i}] has {length:,} characters; at most {MAX_MESSAGE:,} are allowed"
            raise ApiError(400, message, param=f"messages[{i}].content")
    if total > MAX_CONVERSATION:
        message = f"the messages have {total:,} characters in all; at most {MAX_CONVERSATION:,} are allowed"
        raise ApiError(400, message, param="messages")


def fit(tokenizer, messages: list[dict], context: int, max_tokens: int) -> tuple[list[int], int]:
    """(prompt, number of dropped exchanges): the longest end of a conversation that leaves room for a reply.

    An exchange is a user message and its answer; the system message is always kept.
    """
    room = context - 1 - min(max_tokens, context // 4)
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    user_start, forgotten = tokenizer.encode_special("<|user_start|>"), 0
    while True:
        prompt = render_for_completion(tokenizer, {"messages": system + turns[2 * forgotten :]})
        if len(prompt) <= room:
            return prompt, forgotten
        starts = [i for i, token in enumerate(prompt) if token == user_start]
        if len(starts) == 1:
            message = f"the last message has {len(prompt)} tokens, and the model's context of {context} must hold it and the answer"
            param = f"messages[{len(messages) - 1}].content"
            raise ApiError(400, f"{message}; keep it below {room}", param=param, code="context_length_exceeded")
        excess = len(prompt) - room
        forgotten += next((k for k, start in enumerate(starts) if k and start - starts[0] >= excess), len(starts) - 1)


async def events(answer: Answer, workers: Workers, forgotten: int):
    """The reply as server-sent events; those that are ready at the same time are sent together."""
    pieces = Pieces(workers.tokenizer)
    try:
        while news := await answer.take():
            said = [piece for _, token in news for piece in (pieces.finish() if token is None else pieces.push(token))]
            if said:
                yield "".join(f'data: {{"token": {json.dumps(text)}, "type": "{kind}"}}\n\n' for kind, text in said).encode()
    except Exception as error:
        yield error_event(error).encode()
        return
    if not answer.cancelled:
        done = {"done": True, "finish_reason": answer.finish_reasons[0], "usage": answer.usage(), "forgotten": forgotten}
        yield f"data: {json.dumps(done)}\n\n".encode()
