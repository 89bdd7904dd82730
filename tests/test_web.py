"""Whatever is sent to the web server, it answers in one form and never with a trace of its insides."""

import json
import socket

import pytest
import schemathesis
from chat_server import ScriptedEngine, serving
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from nanochat import web

ROUTES = ["/chat/completions", "/v1/chat/completions"]
SOUND = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def site():
    with serving(ScriptedEngine()) as site:
        yield site


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and response.json().keys() == {"error"}
    assert error["type"] == {5: "server_error", 4: "invalid_request_error"}[status // 100]
    assert 10 < len(error["message"]) < 300 and "\n" not in error["message"] and "Traceback" not in response.text
    return error


def send(site, route, body, content_type="application/json"):
    return site.client.post(route, content=body, headers={"Content-Type": content_type} if content_type else {})


# -----------------------------------------------------------------------------
# Bodies


def with_value(raw: str, field: str = "temperature") -> bytes:
    return json.dumps({**SOUND, field: "@"}).replace('"@"', raw).encode()


BODIES = {
    "empty": b"", "blank": b" ", "no JSON": b"hello", "half": json.dumps(SOUND)[:-1].encode(), "two": json.dumps(SOUND).encode() * 2,
    "a list": b"[]", "a string": b'"x"', "null": b"null", "a number": b"1",
    "NaN": with_value("NaN"), "infinity": with_value("-Infinity"), "a number too large": with_value("1e999"),
    "5,000 digits": with_value("9" * 5000), "400 digits": with_value("9" * 400, "max_tokens"),
    "a seed of 5,000 digits": with_value("9" * 5000, "seed"),
    "half a surrogate pair as a role": json.dumps(SOUND).replace('"user"', '"\\ud800"').encode(),
    "deep lists": b"[" * 100_000 + b"]" * 100_000, "deep objects": b'{"a":' * 50_000,
    "deep in a field": with_value("[" * 100_000 + "]" * 100_000, "messages"),
    "wide": json.dumps({**SOUND, "messages": [{}] * 240_000}).encode(),
    "not UTF-8": b'{"messages": "\xff"}', "UTF-16 without a mark": json.dumps(SOUND).encode("utf-16-be")[1:],
    "zeros": bytes(1000), "compressed": b"\x1f\x8b\x08\x00" + bytes(20),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", BODIES)
def test_bodies_that_make_no_sense(site, route, what):
    error_of(send(site, route, BODIES[what]), 400)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", '"'])
def test_only_json_that_says_so_is_taken(site, route, content_type):
    """No form of another site's page can send such a type without asking first, which is never granted."""
    assert "application/json" in error_of(send(site, route, json.dumps(SOUND), content_type), 400)["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_half_a_surrogate_pair_is_refused_or_replaced(site, route):
    response = send(site, route, json.dumps(SOUND).replace('"hi"', '"\\ud800"').encode())
    assert response.status_code in (200, 400)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("length_is_told", [True, False])
def test_large_bodies_are_refused(site, route, length_is_told):
    body = json.dumps({**SOUND, "padding": "x" * web.MAX_BODY}).encode()
    assert "1,000,000" in error_of(send(site, route, body if length_is_told else iter([body[:500_000], body[500_000:]])), 413)["message"]
    body = json.dumps({**SOUND, "padding": "x" * (web.MAX_BODY - 200)}).encode()
    assert send(site, route, body).status_code == 200


def test_a_body_that_never_ends_is_not_awaited_for_ever(site, monkeypatch):
    monkeypatch.setattr(web, "BODY_WITHIN", 0.05)
    with socket.create_connection(site.address.removeprefix("http://").split(":"), timeout=30) as connection:
        connection.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
names = st.sampled_from(["role", "content", "type", "text", "messages"])
json_values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8)
fields = st.sampled_from(["messages", "temperature", "top_k", "max_tokens", "seed", "n", "stop", "stream", "model"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(ROUTES), st.dictionaries(fields, json_values))
def test_any_json_is_answered_or_refused(site, route, body):
    response = send(site, route, json.dumps(body).encode())
    assert response.status_code in (200, 400, 404)
    if response.status_code >= 400:
        error_of(response, response.status_code)


# -----------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/", "/health/", "/docs", "/..%2f..%2fetc/passwd", "/%00", "/v1/models/nothing"])
def test_unknown_addresses(site, path):
    error_of(site.get(path), 404)


@pytest.mark.parametrize("method, path", [
    ("GET", "/chat/completions"), ("PUT", "/v1/chat/completions"), ("OPTIONS", "/chat/completions"),
    ("DELETE", "/"), ("POST", "/health"), ("PATCH", "/v1/models"),
])  # fmt: skip
def test_wrong_methods(site, method, path):
    response = site.client.request(method, path)
    error_of(response, 405)
    assert response.headers["allow"]


def test_the_page_may_load_nothing_from_elsewhere(site):
    response = site.get("/")
    assert response.headers["content-type"].startswith("text/html") and b"<html" in response.content
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'" and policy["script-src"] == policy["style-src"] == "'self' 'unsafe-inline'"
    assert "http" not in response.headers["content-security-policy"]
    assert site.get("/logo.svg").headers["content-type"] == "image/svg+xml"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_no_other_site_is_let_in(site, path):
    response = site.client.get(path, headers={"Origin": "http://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


# -----------------------------------------------------------------------------
# All that the OpenAPI document promises


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_openapi_document_is_true(site, mode):
    document = schemathesis.openapi.from_url(f"{site.address}/openapi.json")
    operations = [operation.ok() for operation in document.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # which takes nothing that could be wrong

        @settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call(timeout=30)
            if response.status_code != 413:  # which schemathesis does not take for a refusal
                # A schema cannot say that roles take turns, so not all that it allows is accepted.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

        check()


def test_a_mistake_of_ours_is_told_without_details(monkeypatch, caplog):
    with serving(ScriptedEngine()) as site:
        monkeypatch.setattr(site.workers, "submit", lambda *args, **kwargs: 1 / 0)
        error = error_of(site.ask(), 500)
        assert "division" not in error["message"]
        monkeypatch.undo()
        assert site.ask().status_code == 200
    assert "division by zero" in caplog.text
