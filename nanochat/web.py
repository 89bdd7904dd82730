"""What all routes of the web server share: the form of errors, limits of bodies, server-sent events.

The one idea to know: whatever goes wrong, the client gets one sentence in one form, OpenAI's
`{"error": {"message", "type", "param", "code"}}`, and never a trace of our insides.

This file is only imported by what serves: it needs FastAPI.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from contextlib import asynccontextmanager
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.exceptions import StarletteHTTPException as AnyHTTPException  # FastAPI's own is one of these
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from nanochat.common import UserError
from nanochat.serving import Answer, EngineFailure, Refused

log = logging.getLogger(__name__)

MAX_BODY = 1_000_000  # bytes
MAX_MESSAGES = 500
BODY_WITHIN = 30  # seconds without a byte of a body that was begun
# A send costs more than the token in it. So streams that are many send less often, several tokens at a time.
SENDS_PER_SECOND = 1000  # of all streams of a worker together
LONGEST_PAUSE = 0.05  # seconds between two sends of a stream, so that it still looks like one

# A page of one's own, without anything from anywhere else. Its script and style stand in the page.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# A proxy on the way must hand on events as they come.
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

# For the OpenAPI document: what a stream of events consists of.
EVENTS = {200: {"content": {"text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}}}}


# -----------------------------------------------------------------------------
# Errors


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_busy", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The form of every error."""

    error: ErrorDetail


ERRORS = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}  # for the OpenAPI document


class ApiError(HTTPException):
    """An error of a request, as shown to the client."""

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        self.type, self.param, self.code = type, param, code

    def body(self) -> dict:
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees for one of our exceptions."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return ApiError(503, str(error), "server_busy")
    if isinstance(error, UserError):
        message = re.match(r"messages\[\d+\]", str(error))
        return ApiError(400, str(error), param=message and message[0])
    if isinstance(error, RequestValidationError):
        # Of what may be a string or a list, the complaint that goes deepest is about what it was meant to be.
        return invalid(max(error.errors(), key=lambda problem: len(problem["loc"])))
    if isinstance(error, AnyHTTPException):
        sentences = {404: "there is no such address here; GET /openapi.json tells what there is",
                     405: "this method is not allowed for this URL", 400: "the request body could not be parsed as JSON"}
        return ApiError(error.status_code, sentences.get(error.status_code, error.detail))
    if isinstance(error, EngineFailure):
        return ApiError(500, str(error), "server_error")
    return ApiError(500, "the server had an internal error; its log has the details", "server_error")


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
    headers = dict(getattr(error, "headers", None) or {})  # which methods are allowed
    if isinstance(error, Refused):
        headers["Retry-After"] = str(error.retry_after)
    if shown.status_code == 500:
        headers["Connection"] = "close"  # uvicorn hangs up after an error that it did not expect
    return JSONResponse(shown.body(), shown.status_code, headers)


def error_event(error: Exception) -> str:
    """The last event of a stream that fails after it has started."""
    if not isinstance(error, EngineFailure):  # which the engine's thread has logged
        log.error("a stream failed", exc_info=error)
    return f"data: {json.dumps(as_api_error(error).body())}\n\n"


def handle_errors(app: FastAPI) -> None:
    for kind in (Refused, UserError, RequestValidationError, AnyHTTPException, EngineFailure, Exception):
        app.add_exception_handler(kind, send_error)


# -----------------------------------------------------------------------------
# Requests


class RequestModel(BaseModel):
    """Part of a request. Numbers must be JSON numbers, without NaN and infinity; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class BodyLimit:
    """Middleware that refuses bodies that are too large or never end."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken, complete = 0, False

        async def limited():
            nonlocal taken, complete
            if complete:  # from here on one waits for the client to leave, however long that takes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_WITHIN)
            except asyncio.TimeoutError:
                raise ApiError(408, f"the request body was incomplete after {BODY_WITHIN} s") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > MAX_BODY:
                raise ApiError(413, f"the request body is larger than {MAX_BODY:,} bytes; send a shorter conversation")
            return message

        await self.app(scope, limited, send)


@asynccontextmanager
async def while_wanted(receive, answer: Answer):
    """Cancels the reply when the client disconnects, and in any case at the end."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        answer.cancel()
        answer.log()


# -----------------------------------------------------------------------------
# Answers


class EventStream(StreamingResponse):
    """Server-sent events from an async iterator, while the client is connected."""

    media_type = "text/event-stream"

    def __init__(self, events, answer: Answer):
        super().__init__(events, headers=EVENT_HEADERS)
        self.answer = answer

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with while_wanted(receive, self.answer):
            async for events in self.body_iterator:
                await send({"type": "http.response.body", "body": events, "more_body": True})
                await asyncio.sleep(min(LONGEST_PAUSE, len(self.answer.worker.answers) / SENDS_PER_SECOND))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
