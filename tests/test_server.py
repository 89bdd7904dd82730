"""The HTTP server, with OpenAI's Python client and plain HTTP, around a scripted engine."""

import json
import select
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pytest
from chat_server import (COMPLETIONS, MODEL, PAGE, REPLIES, ROUTES, TIMEOUT, TOKENIZER, V1, ScriptedEngine, ask, error_of,
                         events_of, joined, message, segments_of, serving, text_of, tokens_of)  # fmt: skip
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from nanochat import server
from nanochat.conversation import render_for_completion
from nanochat.api import ApiError, ChatRequest, CompletionRequest
from nanochat.server import fit
from nanochat.tokenizer import Segments
from scripts import chat_web

# -----------------------------------------------------------------------------
# Text


def shown(tokens, stop) -> list[list[tuple[str, str]]]:
    """The segments of each token, and those at the end."""
    segments = Segments(TOKENIZER, stop)
    return [*(segments.push(token) for token in tokens), segments.finish()]


def test_stop_strings_are_found_in_text_only_and_only_their_possible_beginnings_are_held_back():
    tokens = tokens_of("a=<|python_start|>=b<|python_end|>=b")
    assert joined(sum(shown(tokens, ["=="]), [])) == [("text", "a"), ("python", "=b")]
    lists = shown(TOKENIZER.encode("an EN ENd"), ["END"])
    assert ["".join(text for _, text in segments) for segments in lists] == ["a", "n", " ", "", "", "EN ", "", "", "ENd", ""]


@given(st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4))
def test_text_ends_before_the_first_stop_string(text, stop):
    def naive():
        for end in range(len(text) + 1):
            if found := [text.find(string, 0, end) for string in stop if string in text[:end]]:
                return text[: min(found)]
        return text

    assert "".join(segment for _, segment in sum(shown(TOKENIZER.encode(text), stop), [])) == naive()


# -----------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("messages, prompt", [
    ([message("Be brief.", "developer"), message([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
      message("c", "assistant"), {**message("d"), "name": "me"}],
     "<|user_start|>Be brief.\n\na\nb<|user_end|><|assistant_start|>c<|assistant_end|>"
     "<|user_start|>d<|user_end|><|assistant_start|>"),
    ([message("a"), message([{"type": "text", "text": "="}, {"type": "python", "text": "6*7"},
                             {"type": "python_output", "text": "42"}], "assistant"), message("b")],
     "<|user_start|>a<|user_end|><|assistant_start|>=<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>"
     "<|assistant_end|><|user_start|>b<|user_end|><|assistant_start|>"),
    ([message("count"), message("1, ", "assistant")], "<|user_start|>count<|user_end|><|assistant_start|>1, "),
    ([message("a", "system"), message("b", "developer"), message("c"), message("d")],
     "<|user_start|>a\n\nb\n\nc\n\nd<|user_end|><|assistant_start|>"),
    ([message("a"), message("b", "assistant"), message("c", "system"), message("d"), message("e", "system")],
     "<|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>c\n\nd\n\ne<|user_end|><|assistant_start|>"),
    ([message("a", "system")], "<|user_start|>a<|user_end|><|assistant_start|>"),
    ([message("a", "assistant"), message("b")],
     "<|user_start|><|user_end|><|assistant_start|>a<|assistant_end|><|user_start|>b<|user_end|><|assistant_start|>"),
    ([message("long", "system"), message("b", "assistant"), message([{"type": "python", "text": "1+1"}], "assistant")],
     "<|user_start|>long<|user_end|><|assistant_start|>b\n\n<|python_start|>1+1<|python_end|>"),
    ([message(None), {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
      {**message("4", "tool"), "tool_call_id": "1"}],
     "<|user_start|><|user_end|><|assistant_start|>f({})<|assistant_end|><|user_start|>4<|user_end|><|assistant_start|>"),
])  # fmt: skip
def test_messages_are_rendered_as_in_training_and_a_last_assistant_message_is_continued(site, route, messages, prompt):
    assert site.post(route, messages=messages).status_code == 200
    assert TOKENIZER.decode(site.engine.prompts[-1]) == "<|bos|>" + prompt


@pytest.mark.parametrize("system", [None, "Be brief, and kind."])
@pytest.mark.parametrize("lengths", [[10] * 3, [10] * 31, [100, 100, 100], [1, 1, 1, 150, 1], [90, 20, 30, 40, 80, 5, 60], [0] * 101])
def test_as_few_exchanges_as_possible_are_dropped(lengths, system):
    """Against trying every number of exchanges."""
    messages = [message("x" * length, "assistant" if i % 2 else "user") for i, length in enumerate(lengths)]
    head = [message(system, "system")] if system else []
    prompt, dropped = fit(TOKENIZER, head + messages, 200, 30)
    rendered = [render_for_completion(TOKENIZER, {"messages": head + messages[2 * n :]}) for n in range(len(lengths) // 2 + 1)]
    fitting = [n for n, ids in enumerate(rendered) if len(ids) <= 200 - 1 - 30]
    assert dropped == fitting[0] and prompt == rendered[dropped]
    # A reply gets at most a quarter of the context
    with pytest.raises(ApiError, match="keep them below 150.*context_length_exceeded"):
        fit(TOKENIZER, head + messages[:-1] + [message("x" * 199, messages[-1]["role"])], 200, 1000)


def test_what_is_far_too_long_is_not_encoded(monkeypatch):
    encoded, encode = [], TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: encoded.append(len(text)) or encode(text))
    messages = [message("x" * (100_000 if i < 9 else 30), "assistant" if i % 2 else "user") for i in range(101)]
    assert fit(TOKENIZER, messages, 400, 30)[1] > 40 and sum(encoded) < 9 * 4 * 400
    with pytest.raises(ApiError, match="at least 100000 tokens"):
        fit(TOKENIZER, messages[:1], 400, 30)


# -----------------------------------------------------------------------------
# Replies


def test_page_reply_is_an_event_per_token_then_done(site):
    response = site.ask()
    *tokens, done = events_of(response)
    assert tokens == [{"token": letter, "type": "text"} for letter in "hello"]
    prompt = len(site.engine.prompts[-1])
    usage = {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    assert done == {"done": True, "finish_reason": "stop", "usage": usage, "forgotten": 0}
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert segments_of(site.ask("sums")) == [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    assert segments_of(site.ask("emoji")) == [("text", REPLIES["emoji"])]
    assert events_of(site.ask("silence"))[-1]["usage"]["completion_tokens"] == 0
    assert events_of(site.ask("long", max_tokens=7))[-1]["finish_reason"] == "length"
    end = events_of(site.ask("long"))[-1]
    assert end["finish_reason"] == "context" and end["usage"]["total_tokens"] == site.engine.context


def test_models(client):
    models = client.models.list().data
    assert [(model.id, model.max_model_len) for model in models] == [(MODEL, 400), ("nanochat", 400)]
    assert [client.models.retrieve(model.id) for model in models] == models
    for name in (MODEL, "nanochat"):
        assert ask(client, model=name).model == MODEL
    for name in ("gpt-4o", "a/b"):
        for request in (lambda: ask(client, model=name), lambda: client.models.retrieve(name)):
            with pytest.raises(openai.NotFoundError, match=MODEL) as caught:
                request()
            assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_completion(client, site):
    reply = ask(client, n=3)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    choices = [(choice.index, choice.message.role, choice.message.content, choice.finish_reason) for choice in reply.choices]
    assert choices == [(i, "assistant", "hello", "stop") for i in range(3)]
    assert [settings["sample_index"] for settings in site.engine.settings[-3:]] == [0, 1, 2]
    assert reply.usage.completion_tokens == 15 and reply.usage.total_tokens == reply.usage.prompt_tokens + 15
    assert ask(client, "sums").choices[0].message.content == "It is 42."  # text only
    for limits in ({"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_tokens": 99, "max_completion_tokens": 7}):
        reply = ask(client, "long", **limits)
        assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 7
    assert ask(client, "long", max_tokens=100_000).choices[0].finish_reason == "length"  # the context is full
    assert ask(client, "long" * 98 + "abc").usage.total_tokens == site.engine.context  # room for one token suffices
    with pytest.raises(openai.BadRequestError, match="the messages have 504 tokens") as caught:
        ask(client, "x" * 500)
    assert caught.value.param == "messages" and caught.value.code == "context_length_exceeded"


def test_streamed_completion(client):
    *chunks, last = ask(client, stream=True, stop="!", stream_options={"include_usage": True})
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and text_of(chunks) == "hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage == ask(client).usage and not any(chunk.usage for chunk in chunks)
    chunks = list(ask(client, n=3, stream=True))
    for index in range(3):
        mine = [chunk for chunk in chunks if chunk.choices[0].index == index]
        assert text_of(mine) == "hello" and mine[-1].choices[0].finish_reason == "stop" and not mine[-1].usage


@pytest.mark.parametrize("route", ROUTES)
def test_settings_reach_the_engine_and_defaults_replace_missing_ones(route):
    with serving(ScriptedEngine(), temperature=0.5, top_k=7, max_tokens=3) as site:
        site.ask(path=route, temperature=0, top_k=0, top_p=0.5, max_tokens=50, seed=-(10**30), unknown={}, presence_penalty=0)
        for _ in range(2):
            site.ask(path=route)
        given, first, second = site.engine.settings
        assert given == {"temperature": 0, "top_k": None, "top_p": 0.5, "seed": -(10**30), "sample_index": 0}
        assert (first["temperature"], first["top_k"]) == (0.5, 7) and first["seed"] != second["seed"]
        assert [len(seq.generated) for seq in site.engine.submitted] == [len("hello."), 3, 3]


# -----------------------------------------------------------------------------
# Errors

VALID = {"messages": [message()], "max_tokens": 2}


def send(site, route, body, content_type="application/json"):
    return site.client.post(route, content=body, headers={"Content-Type": content_type} if content_type else {})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body, param, says", [
    ({}, "messages", "required"),
    ({"messages": [message()] * 501}, "messages", "at most 500"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [message(role="robot")]}, "messages[0].role", "'system', 'developer', 'user', 'assistant', 'tool'"),
    ({"messages": [message(3)]}, "messages[0].content", "string"),
    ({"messages": [message([{"type": "image", "text": ""}])]}, "messages[0].content[0].type", "no images"),
    ({"messages": [message([{"type": "text", "text": ""}] * 201)]}, "messages[0].content", "at most 200"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": True}, "temperature", "number"),
    ({"max_tokens": 10**400}, "max_tokens", "1000000"),
    ({"stop": ["a", 3]}, "stop[1]", "string"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
])  # fmt: skip
def test_invalid_requests_name_the_field(site, route, body, param, says):
    error = error_of(site.post(route, **(body if not body or "messages" in body else {**VALID, **body})), 400)
    assert error["param"] == param and says in error["message"]


def with_value(raw: str, field: str = "temperature") -> bytes:
    return json.dumps({**VALID, field: "@"}).replace('"@"', raw).encode()


BODIES = [
    b"", b"hello", json.dumps(VALID)[:-1].encode(), json.dumps(VALID).encode() * 2, b"[]", b'{"messages": "\xff"}',
    with_value("NaN"), with_value("1e999"), with_value("9" * 5000, "seed"), b"[" * 50_000, b'{"a":' * 50_000,
    with_value("[" + "{}," * 40_000 + "{}]", "messages"), json.dumps({"messages": [message([{}] * 40_000)]}).encode(),
    json.dumps(VALID).replace('"user"', '"\\ud800"').encode(),
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_malformed_bodies(site, route):
    for body in BODIES:
        error_of(send(site, route, body), 400)
    for content_type in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", '"'):
        # So no form of another site's page can send a request without a preflight request
        assert "application/json" in error_of(send(site, route, json.dumps(VALID), content_type), 400)["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_above_the_limit_are_refused(site, route):
    body = json.dumps({**VALID, "padding": "x" * server.MAX_BODY}).encode()
    for content in (body, iter([body[:500_000], body[500_000:]])):  # the second is sent in chunks of unknown number
        assert "1,000,000" in error_of(send(site, route, content), 413)["message"]
    assert send(site, route, body[:-300] + b'"}').status_code == 200
    assert "more than 50,000 lists" in error_of(send(site, route, b"[" * 50_001), 413)["message"]


@pytest.mark.parametrize("status, hosts", [
    (403, ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1"]),
    (200, ["localhost", "LocalHost:1", "127.0.0.1:8000", "[::1]:8000"]),
])  # fmt: skip
def test_requests_for_other_hosts_are_refused(site, status, hosts):
    """A page whose name resolves to 127.0.0.1 cannot use the server."""
    for host in hosts:
        assert site.client.get("/health", headers={"Host": host}).status_code == status, host
        assert site.client.post(PAGE, json=VALID, headers={"Host": host}).status_code == status, host
    assert "--host" in error_of(site.client.get("/", headers={"Host": "evil.example"}), 403)["message"]


@pytest.mark.parametrize("host, address, names", [
    ("127.0.0.2", "127.0.0.2", {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}),
    ("::1", "::1", {"localhost", "127.0.0.1", "[::1]"}), ("0.0.0.0", "0.0.0.0", set()), ("my.net", "10.0.0.1", set()),
])  # fmt: skip
def test_only_a_server_on_loopback_knows_its_names(host, address, names):
    assert chat_web.own_names(host, SimpleNamespace(getsockname=lambda: (address, 8000))) == names


def test_a_request_of_ambiguous_length_is_refused_and_its_connection_closed(site):
    with site.connect() as connection:
        lengths = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        host = "HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(f"POST {PAGE} {host}{lengths}GET / {host}\r\n".encode())
        reply = read_all(connection)
        assert reply.startswith(b"HTTP/1.1 400 ") and reply.count(b"HTTP/1.1") == 1


def test_an_incomplete_body_times_out_and_the_connection_is_closed(site, monkeypatch):
    monkeypatch.setattr(server, "BODY_TIMEOUT", 0.05)
    with site.connect() as connection:
        head = f"POST {PAGE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("messages", [[{}] * 100_000, [{"role": "user", "content": [{}] * 100_000}], [{"content": [{}] * 200}] * 400])
def test_a_body_full_of_mistakes_gets_one_error(messages):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": messages})
    assert caught.value.error_count() < 10


def read_all(connection) -> bytes:
    """What the server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_clients_that_send_no_complete_header_are_disconnected(monkeypatch):
    monkeypatch.setattr(chat_web, "HEADER_TIMEOUT", 0.5)
    monkeypatch.setattr(chat_web, "KEEP_ALIVE", 0.5)
    engine = ScriptedEngine()
    engine.hold()
    with serving(engine) as site, site.open() as running, ExitStack() as stack:
        silent, half, second = (stack.enter_context(site.connect()) for _ in range(3))
        half.sendall(b"GET /health HTTP/1.1\r\nHost:")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health")
        assert read_all(silent) == read_all(half) == b""
        assert read_all(second).startswith(b"HTTP/1.1 200 ")
        engine.release()
        assert running.read().endswith(b"\n\n")  # a reply that takes long is not disconnected


def test_above_the_limit_idle_connections_are_closed(monkeypatch):
    monkeypatch.setattr(chat_web, "raise_file_limit", lambda: 4)
    with serving(ScriptedEngine()) as site, ExitStack() as stack:
        slow = [stack.enter_context(site.connect()) for _ in range(8)]
        closed = set()
        while len(closed) < 4:
            closed.update(select.select(slow, [], [], TIMEOUT)[0])
        assert all(read_all(connection) == b"" for connection in closed)
        assert site.ask().status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner), max_leaves=8,
)  # fmt: skip
FIELDS = [(route, field) for route, model in ((PAGE, ChatRequest), (V1, ChatRequest), (COMPLETIONS, CompletionRequest))
          for field in model.model_fields if field != "prompt"]  # fmt: skip


@settings(max_examples=90, deadline=None, derandomize=True)
@given(st.sampled_from(FIELDS), values)
def test_any_value_of_a_field_is_accepted_or_refused_with_an_error(site, route_and_field, value):
    route, field = route_and_field
    body = {**VALID, "prompt": tokens_of("<|bos|><|assistant_start|>"), field: value}
    response = send(site, route, json.dumps(body).encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response, response.status_code)


def test_unknown_urls_and_methods(site):
    for path in ("/nothing", "/v1/", "/docs", "/..%2f..%2fetc/passwd", "/%00"):
        error_of(site.get(path), 404)
    for method, path in (("GET", PAGE), ("OPTIONS", V1), ("POST", "/health")):
        error_of(response := site.client.request(method, path), 405)
        assert response.headers["allow"]


def test_the_page_can_load_nothing_from_elsewhere_and_other_sites_are_not_allowed(site):
    response = site.client.get("/", headers={"Origin": "http://evil.example"})
    assert response.headers["content-type"].startswith("text/html") and b"<html" in response.content
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'" and policy["script-src"] == policy["style-src"] == "'self' 'unsafe-inline'"
    assert "http" not in response.headers["content-security-policy"]
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert site.get("/logo.svg").headers["content-type"] == "image/svg+xml"


def test_an_internal_error_shows_no_details_and_a_mistake_does(site, monkeypatch, caplog):
    monkeypatch.setattr(site.pool, "submit", lambda *args, **kwargs: 1 / 0)
    assert "division" not in error_of(site.ask(), 500)["message"]
    monkeypatch.undo()
    monkeypatch.setattr(site.engine, "context", 0)  # the engine refuses everything
    assert "it must have 1 to" in error_of(site.ask(path=V1), 400)["message"]
    assert "it must have 1 to" in events_of(site.ask())[-1]["error"]["message"]
    monkeypatch.undo()
    assert site.ask().status_code == 200
    assert "division by zero" in caplog.text
