"""OpenAI's protocol: what requests may contain, the objects of replies, and errors.

What clients send is accepted in many shapes, and values that mean "off" to other servers mean it here. What this server
cannot do is refused with a sentence; fields that ask for nothing (`user`, `metadata`, `store`) are ignored. `tools` too
are accepted unless one must be called: the model just never calls them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.exceptions import HTTPException, RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from nanochat.common import UserError
from nanochat.conversation import PARTS
from nanochat.engine_thread import Busy, EngineFailure

UNLIMITED = 1_000_000  # tokens: until the context is full


# -----------------------------------------------------------------------------
# Requests


class RequestModel(BaseModel):
    """Part of a request. Numbers must be JSON numbers, without NaN and infinity; unknown fields are ignored.

    Lists fail at their first error: to report each of half a million would stop the event loop for seconds.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def unless(allowed, sentence: str) -> AfterValidator:
    """Refuses values that are not `allowed` with a sentence."""

    def check(value):
        if not allowed(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def refused(sentence: str, *allowed) -> type:
    """The type of a field of which only values that ask for nothing are possible, and those that are `allowed`."""
    return Annotated[Any, unless(lambda value: not value or value in allowed, sentence)]


def off(value, meaning) -> BeforeValidator:
    """Replaces a number that means "off" to other servers."""
    return BeforeValidator(lambda given: meaning if given == value and type(given) in (int, float) else given)


class Function(RequestModel):
    name: str = ""
    arguments: str = ""


class ToolCall(RequestModel):
    function: Function = Function()


class Part(RequestModel):
    type: Annotated[str, unless(lambda kind: kind in PARTS, "it should be 'text': the model reads no images, audio or files")]
    text: str


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=200, fail_fast=True)] | None
    tool_calls: Annotated[list[ToolCall], Field(max_length=200, fail_fast=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def add_content(cls, message):
        """An assistant's message may lack its content, as one that only calls tools does."""
        return {"content": None, **message} if isinstance(message, dict) and message.get("role") == "assistant" else message

    def parts(self) -> list[dict]:
        """The content as parts, without empty text; what is not the assistant's is one part. Calls of tools become text."""
        if self.role == "assistant" and isinstance(self.content, list):
            parts = [part.model_dump() for part in self.content]
        elif isinstance(self.content, list):
            parts = [text_part("\n".join(part.text for part in self.content))]
        else:
            parts = [text_part(self.content or "")]
        for call in self.tool_calls or []:
            parts.append(text_part(f"{call.function.name}({call.function.arguments})"))
        return [part for part in parts if part != text_part("")]


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def as_turns(messages: list[Message]) -> list[dict]:
    """Messages of any roles in any order as conversation.py expects them: user and assistant alternating.

    At the start there may be a system message; later ones, and results of tools, are the user's text. Neighbours of a
    role are joined by blank lines. An assistant's message at the start answers an empty one.
    """
    turns: list[tuple[str, list[dict]]] = []
    for message in messages:
        role = {"assistant": "assistant", "system": "system", "developer": "system"}.get(message.role, "user")
        if role == "system" and turns and turns[-1][0] != "system":
            role = "user"
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        parts, new = turns[-1][1], message.parts()
        parts += [text_part("\n\n"), *new] if parts and new else new
    roles = [role for role, _ in turns]
    if roles == ["system"] or roles[:2] == ["system", "assistant"]:
        turns[0] = ("user", turns[0][1])
    if roles[0] == "assistant":
        turns.insert(0, ("user", []))
    texts = ["".join(part["text"] for part in parts) for _, parts in turns]
    # One string is encoded as a whole
    return [
        {"role": role, "content": text if all(part["type"] == "text" for part in parts) else parts}
        for (role, parts), text in zip(turns, texts)
    ]


class StreamOptions(RequestModel):
    include_usage: bool | None = None


def as_list(value):
    """A single string or the token ids of a single prompt as a list of one."""
    single = isinstance(value, str) or isinstance(value, list) and value and isinstance(value[0], int)
    return [value] if single else value


StopString = Annotated[str, StringConstraints(max_length=100)]
StopStrings = Annotated[
    Annotated[list[StopString], Field(max_length=4, fail_fast=True)],
    BeforeValidator(as_list),
    AfterValidator(lambda strings: [string for string in strings if string]),
]
MaxTokens = Annotated[int | None, Field(ge=1, le=UNLIMITED), off(-1, UNLIMITED)]
NO_PENALTY = "penalties are not supported: it should be 0; to get less repetition, raise the temperature"
NO_TOOLS = "the model calls no functions: it should be 'auto' or 'none', and the reply will be text"


class GenerationRequest(RequestModel):
    """What the bodies of all routes that generate have in common."""

    max_tokens: MaxTokens = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: Annotated[int | None, Field(ge=0, le=200), off(-1, 0)] = None  # 0: all tokens
    top_p: Annotated[float | None, Field(gt=0, le=1), off(0, 1.0)] = None
    seed: Annotated[int | None, off(-1, None)] = None
    stop: StopStrings | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=8)
    frequency_penalty: refused(NO_PENALTY) = None
    presence_penalty: refused(NO_PENALTY) = None
    repetition_penalty: refused(NO_PENALTY.replace("0", "1", 1), 1) = None
    logit_bias: refused("it is not supported: leave it out; `stop` ends a reply before a given text") = None


class ChatRequest(GenerationRequest):
    """The body of the chat routes. The page's replies are always one stream of text."""

    messages: list[Message] = Field(min_length=1, max_length=500, fail_fast=True)
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: refused(NO_TOOLS, "auto", "none") = None
    function_call: refused(NO_TOOLS, "auto", "none") = None
    functions: refused("the model calls no functions: leave it out, and the reply will be text") = None
    response_format: refused('the form of replies cannot be enforced: it should be {"type": "text"}', {"type": "text"}) = None
    modalities: refused("the model writes text only: it should be ['text']", ["text"]) = None
    audio: refused("the model writes text only: leave it out") = None


TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MANY = Field(min_length=1, max_length=128, fail_fast=True)


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions, which continues text without the form of a conversation."""

    prompt: Annotated[Annotated[list[str], MANY] | Annotated[list[TokenIds], MANY], BeforeValidator(as_list)]
    max_tokens: Annotated[int | None, Field(ge=0, le=UNLIMITED), off(-1, UNLIMITED)] = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: refused("replies are not ranked: it should be 1; `n` asks for several", 1) = None
    suffix: refused("the model only continues text: leave it out") = None


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
            return ApiError(503, str(error), "server_busy", headers={"Retry-After": "5"})  # seconds
        case EngineFailure():
            return ApiError(500, str(error), "server_error")
        case UserError():
            return ApiError(400, str(error))
        case RequestValidationError():
            # For a field that may be a string or a list, pydantic reports both; the most specific error is the useful one
            general = ("string_type", "list_type")
            return invalid(max(error.errors(), key=lambda item: (item["type"] not in general, len(item["loc"]))))
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
    text = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1).replace(" after validation", "")
    return ApiError(400, f"{param}: {text}", param=param)


# -----------------------------------------------------------------------------
# Replies


class ScoredToken(NamedTuple):
    """A token of a reply's text, or of an echoed prompt."""

    data: bytes
    offset: int  # in the text, in characters
    logprob: float | None  # None for a first token, which nothing precedes
    top: dict[bytes, float]  # the most likely tokens in its place


def chat_logprobs(tokens: list[ScoredToken]) -> dict:
    def item(data: bytes, logprob: float) -> dict:
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = []
    for token in tokens:
        top = [item(data, logprob) for data, logprob in token.top.items()]
        content.append({**item(token.data, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[ScoredToken]) -> dict:
    """The most likely tokens include the one that was chosen."""

    def shown(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:  # different tokens must not look the same
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def top(token: ScoredToken) -> dict | None:
        if token.logprob is None:
            return None
        likely = {**token.top, token.data: token.logprob}
        return {shown(data): logprob for data, logprob in likely.items()}

    return {
        "tokens": [shown(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [top(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }
