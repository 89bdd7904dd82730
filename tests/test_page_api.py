"""POST /chat/completions, which the page talks to: events, limits, and what is forgotten when the context is full."""

import pytest
from chat_server import TOKENIZER, ScriptedEngine, answering, events_of, pieces_of, serving

from nanochat.conversation import render_for_completion
from nanochat.page_api import fit
from nanochat.web import ApiError

REPLIES = {
    "emoji": "né 👩‍🚀!",
    "sums": "It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.",
    "silence": "",
    "long": "x" * 1000,
}


@pytest.fixture(scope="module")
def site():
    with serving(ScriptedEngine(answering(REPLIES))) as site:
        yield site


# -----------------------------------------------------------------------------
# Events


def test_a_reply_is_an_event_per_token_and_one_that_it_is_done(site):
    *tokens, done = events_of(site.ask())
    assert tokens == [{"token": letter, "type": "text"} for letter in "hello"]
    prompt = len(render_for_completion(TOKENIZER, {"messages": [{"role": "user", "content": "hi"}]}))
    usage = {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    assert done == {"done": True, "finish_reason": "stop", "usage": usage, "forgotten": 0}


def test_nothing_on_the_way_may_keep_events_back(site):
    headers = site.ask().headers
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers and "content-encoding" not in headers


def test_events_come_while_the_reply_is_being_written():
    engine = ScriptedEngine()
    engine.hold()
    with serving(engine) as site, site.open() as response:
        lines = response.iter_lines()
        for letter in "hello":
            engine.allow(1)
            assert next(lines) == f'data: {{"token": "{letter}", "type": "text"}}' and next(lines) == ""
        engine.release()


def test_calls_of_the_calculator_are_marked(site):
    assert pieces_of(site.ask("sums")) == [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]


def test_why_a_reply_ended(site):
    assert events_of(site.ask("silence")) == [{"done": True, "finish_reason": "stop", "forgotten": 0,
                                               "usage": {"prompt_tokens": 11, "completion_tokens": 0, "total_tokens": 11}}]
    assert events_of(site.ask("long", max_tokens=7))[-1]["finish_reason"] == "length"
    end = events_of(site.ask("long"))[-1]
    assert end["finish_reason"] == "context" and end["usage"]["total_tokens"] == site.engine.context


def test_settings_reach_the_engine_and_defaults_stand_in():
    with serving(ScriptedEngine(), temperature=0.5, top_k=7, max_tokens=3) as site:
        site.ask(temperature=0, top_k=0, max_tokens=50, seed=-(10**30))
        assert events_of(site.ask())[-1]["usage"]["completion_tokens"] == 3
        site.ask()
        given, *defaults = [row.settings for row in site.engine.asked]
        assert given == {"temperature": 0, "top_k": None, "seed": -(10**30), "sample_index": 0}
        assert [(row["temperature"], row["top_k"]) for row in defaults] == [(0.5, 7)] * 2
        assert defaults[0]["seed"] != defaults[1]["seed"]


def test_a_conversation_with_parts_is_rendered_as_in_training(site):
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": parts}, {"role": "user", "content": "b"}]
    assert site.post("/chat/completions", messages=messages).status_code == 200
    row = site.engine.asked[-1]
    assert row.tokens[: row.prompt_length] == render_for_completion(TOKENIZER, {"messages": messages})


# -----------------------------------------------------------------------------
# Limits


def message(content="hi", role="user"):
    return {"role": role, "content": content}


@pytest.mark.parametrize("body, param, says", [
    ({}, "messages", "required"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [message()] * 501}, "messages", "at most 500"),
    ({"messages": ["hi"]}, "messages[0]", "Message|dictionary"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [message(role="robot")]}, "messages[0].role", "'system', 'user' or 'assistant'"),
    ({"messages": [message(3)]}, "messages[0].content", "string"),
    ({"messages": [message(None)]}, "messages[0].content", "string"),
    ({"messages": [message("x" * 8001)]}, "messages[0].content", "8000"),
    ({"messages": [message(), message([{"type": "text", "text": "x" * 4001}] * 2, "assistant"), message()]},
     "messages[1].content", "8,000"),
    ({"messages": [message("x" * 8000), message("x" * 8000, "assistant")] * 2 + [message()]}, "messages", "32,000"),
    ({"messages": [message(), message([{"type": "image", "text": ""}], "assistant"), message()]}, "messages[1].content[0].type", "'text'"),
    ({"messages": [message([{"type": "text", "text": "hi"}])]}, "messages[0]", "must be a string"),
    ({"messages": [message(), message()]}, "messages[1]", "must alternate|must follow"),
    ({"messages": [message(role="assistant"), message()]}, "messages[0]", "is expected|must follow"),
    ({"messages": [message(), message("x", "assistant")]}, "messages[1].role", "last message"),
    ({"messages": [message(role="system")]}, "messages[0].role", "last message"),
    ({"messages": [message("x" * 400)]}, "messages[0].content", "404 tokens"),
    ({"messages": [message()], "temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"messages": [message()], "temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"messages": [message()], "temperature": 10**400}, "temperature", ""),
    ({"messages": [message()], "temperature": "hot"}, "temperature", "number"),
    ({"messages": [message()], "temperature": True}, "temperature", "number"),
    ({"messages": [message()], "top_k": -1}, "top_k", "0"),
    ({"messages": [message()], "top_k": 201}, "top_k", "200"),
    ({"messages": [message()], "top_k": 1.5}, "top_k", "integer"),
    ({"messages": [message()], "max_tokens": 0}, "max_tokens", "1"),
    ({"messages": [message()], "max_tokens": 4097}, "max_tokens", "4096"),
    ({"messages": [message()], "max_tokens": 10**400}, "max_tokens", "4096"),
    ({"messages": [message()], "seed": "x"}, "seed", "integer"),
])  # fmt: skip
def test_every_limit_is_told_with_the_field(site, body, param, says):
    before = len(site.engine.asked)
    response = site.post("/chat/completions", **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert any(word in error["message"] for word in says.split("|")) and len(error["message"]) < 300
    assert len(site.engine.asked) == before


def test_the_limits_themselves_are_allowed(site):
    for settings in ({"temperature": 0}, {"temperature": 2.0}, {"top_k": 200}, {"max_tokens": 4096}, {"seed": None}, {"unknown": 1}):
        assert site.ask(**settings).status_code == 200
    messages = [message("x" * 7900), message("x" * 8000, "assistant")] * 2 + [message("ok")]
    assert events_of(site.post("/chat/completions", messages=messages))[-1]["forgotten"] == 2


# -----------------------------------------------------------------------------
# Forgetting


def conversation(lengths, system=None) -> list[dict]:
    turns = [message("x" * length, "assistant" if i % 2 else "user") for i, length in enumerate(lengths)]
    return [message(system, "system"), *turns] if system else turns


@pytest.mark.parametrize("system", [None, "Be brief, and kind."])
@pytest.mark.parametrize("lengths", [[10] * 3, [10] * 31, [100, 100, 100], [1, 1, 1, 150, 1], [90, 20, 30, 40, 80, 5, 60], [0] * 101])
def test_as_little_as_possible_is_forgotten_from_the_front(lengths, system):
    """Against trying every number of exchanges."""
    messages, context, max_tokens = conversation(lengths, system), 200, 30
    prompt, forgotten = fit(TOKENIZER, messages, context, max_tokens)
    head = messages[:1] if system else []

    def rendered(number):
        return render_for_completion(TOKENIZER, {"messages": head + messages[len(head) + 2 * number :]})

    fitting = [number for number in range(len(lengths) // 2 + 1) if len(rendered(number)) <= context - 1 - 30]
    assert forgotten == fitting[0] and prompt == rendered(forgotten)
    assert system is None or system in TOKENIZER.decode(prompt)


def test_an_answer_gets_a_quarter_of_the_context_at_most():
    messages = conversation([100, 1, 50])
    assert fit(TOKENIZER, messages, 200, 10)[1] == 0
    assert fit(TOKENIZER, messages, 200, 10_000)[1] == 1


def test_a_last_message_that_does_not_fit_alone_is_refused():
    with pytest.raises(ApiError, match="keep it below 149") as caught:
        fit(TOKENIZER, conversation([10, 10, 150]), 200, 1000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages[2].content"
