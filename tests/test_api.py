"""OpenAI's API beyond chats: completions, log-probabilities, access from elsewhere; and what is accepted or refused."""

from functools import partial

import openai
import pytest
import torch
from chat_server import COMPLETIONS, MODEL, ROUTES, TOKENIZER, V1, ScriptedEngine, ask, error_of, message, serving, tokens_of
from tiny import tiny_gpt

from nanochat.engine import Engine

ALL = [*ROUTES, COMPLETIONS]


@pytest.mark.parametrize("route", ALL)
def test_values_that_mean_off_to_other_servers_mean_off(site, route):
    body = {"messages": [message("long")], "prompt": tokens_of("<|bos|>long<|assistant_start|>")}
    off = {"max_tokens": -1, "top_k": -1, "top_p": 0, "stop": "", "seed": -1, "n": None, "logit_bias": {}, "presence_penalty": 0}
    extras = {"user": "me", "metadata": {}, "store": True, "tools": [{}], "tool_choice": "auto", "stream_options": None,
              "response_format": {"type": "text"}, "repetition_penalty": 1, "logprobs": None}  # fmt: skip
    for stop in ("", [], [""], None):
        assert site.post(route, **body, **{**off, "stop": stop}, **extras).status_code == 200
        assert site.engine.submitted[-1].finish_reason == "context" and site.engine.settings[-1]["seed"] >= 0
        assert (site.engine.settings[-1]["top_k"], site.engine.settings[-1]["top_p"]) == (None, 1)


@pytest.mark.parametrize("field, value, says, routes", [
    ("tool_choice", "required", "'auto' or 'none'", ROUTES), ("tool_choice", {"type": "function"}, "'auto'", ROUTES),
    ("functions", [{}], "leave it out", ROUTES), ("response_format", {"type": "json_object"}, '{"type": "text"}', ROUTES),
    ("response_format", {"type": "json_schema"}, "cannot be enforced", ROUTES),
    ("modalities", ["text", "audio"], "['text']", ROUTES),
    ("logit_bias", {"7": 1}, "leave it out", ALL), ("presence_penalty", 0.5, "should be 0", ALL),
    ("repetition_penalty", 1.1, "should be 1", ALL), ("stop", ["a"] * 5, "at most 4", ALL),
    ("logprobs", 6, "equal to 5", [COMPLETIONS]),
    ("suffix", "x", "leave it out", [COMPLETIONS]), ("best_of", 2, "should be 1", [COMPLETIONS]),
    *(("prompt", prompt, says, [COMPLETIONS]) for prompt, says in [
        (None, "list"), ([], "at least 1"), ([[]], "at least 1"), (["a", 3], "prompt[1]"), ([[1, "a"]], "prompt[0][1]"),
        ([1, -1], "prompt[0][1]"), ([1, 999], "below 265"), ("x" * 400, "has 401 tokens"), ([1] * 400, "below 400"),
        ("x" * 9999, "at least 9999 tokens"), (["a"] * 129, "at most 128")]),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_is_possible(site, field, value, says, routes):
    for route in routes:
        error = error_of(site.post(route, **{"messages": [message()], "prompt": "a", field: value}), 400)
        assert says in error["message"] and error["param"].startswith(field)


# -----------------------------------------------------------------------------
# Completions and log-probabilities, of a model with real logits


@pytest.fixture(scope="module")
def model():
    model = tiny_gpt(vocab_size=TOKENIZER.get_vocab_size(), sequence_len=400, head_std=0.3)
    model.lm_head.weight.data[256:] = 0  # special tokens are unlikely
    return model


@pytest.fixture(scope="module")
def base(model):
    """A base model's server, and OpenAI's client of it."""
    with serving(Engine(model, TOKENIZER), name="base d2 step 8") as site:
        yield site, partial(site.openai.completions.create, model="nanochat")


def test_a_base_model_continues_texts_and_does_not_chat(base, model):
    site, complete = base
    for prompt, ids in (("Once", tokens_of("<|bos|>Once")), (tokens_of("upon"), tokens_of("upon"))):
        expected = TOKENIZER.decode(list(model.generate(ids, 9, temperature=0)))
        reply = complete(prompt=prompt, temperature=0, max_tokens=9)
        assert reply.choices[0].text == expected and reply.choices[0].finish_reason == "length"
        assert (reply.object, reply.usage.prompt_tokens, reply.usage.completion_tokens) == ("text_completion", len(ids), 9)
    assert complete(prompt="a").usage.completion_tokens <= 16  # OpenAI's default
    for route in ROUTES:
        assert "/v1/completions" in error_of(site.ask(path=route), 400)["message"]
    assert site.get("/health").json()["chats"] is False


@pytest.mark.parametrize("prompts", [["hé 👩!" + "x" * 300], [tokens_of("<|bos|>hé"), tokens_of("bc")], ["a", "", "a"]])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_echo_and_logprobs_of_completions(base, model, monkeypatch, prompts, max_tokens):
    """Long prompts are scored in chunks, and repeated ones without the prefix cache."""
    monkeypatch.setattr("nanochat.engine.SCORED_AT_ONCE", 50)
    settings = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 2}
    reply = base[1](**settings)
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        ids = prompt if isinstance(prompt, list) else tokens_of("<|bos|>" + prompt)
        ids = [*ids, *model.generate(ids, max_tokens, temperature=0)]
        shown = ids[isinstance(prompt, str) :]  # without a bos that was not sent
        assert choice.text == TOKENIZER.decode(shown) and choice.finish_reason == "length"
        if not shown:
            assert choice.logprobs is None
            continue
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).log_softmax(-1)[0]
        expected = [None, *log_probs[torch.arange(len(ids) - 1), ids[1:]].tolist()][-len(shown) :]
        assert choice.logprobs.token_logprobs == [value and pytest.approx(value, abs=1e-4) for value in expected]
        assert [top and max(top.values()) for top in choice.logprobs.top_logprobs][1:] == pytest.approx(
            log_probs.amax(-1).tolist()[: len(ids) - 1][1 - len(shown) :] if len(shown) > 1 else [], abs=1e-4)
        for token, id, offset in zip(choice.logprobs.tokens, shown, choice.logprobs.text_offset, strict=True):
            data = TOKENIZER.id_to_bytes(id)
            assert token == (f"bytes:\\x{data[0]:02x}" if data[0] >= 128 else data.decode()) and offset <= len(choice.text)
            assert data[0] >= 128 or token in choice.text[offset : offset + 1 + len(token)]
    chunks = list(base[1](**settings, stream=True))
    for index, choice in enumerate(reply.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(chunk.text for chunk in mine) == choice.text and mine[-1].finish_reason == "length"
        streamed = sum((chunk.logprobs.token_logprobs for chunk in mine if chunk.logprobs), [])
        assert streamed == (choice.logprobs.token_logprobs if choice.logprobs else [])


def test_logprobs_of_a_chat_are_those_of_its_text(client, site):
    for text, tokens in (("sums", "It is 42."), ("count", "1, 2"), ("emoji", "né 👩‍🚀!")):
        for scored in ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True}):
            settings = {**scored, "stop": [", 3"]}
            content = ask(client, text, **settings).choices[0].logprobs.content
            assert bytes(sum((token.bytes for token in content), [])).decode() == tokens
            assert all(token.logprob == 0 and len(token.top_logprobs) == scored.get("top_logprobs", 0) for token in content)
            streamed = [chunk.choices[0].logprobs for chunk in ask(client, text, stream=True, **settings)]
            assert sum((logprobs.content for logprobs in streamed if logprobs), []) == content
    assert ask(client).choices[0].logprobs is None and site.engine.submitted[-1].scores == []


def test_a_terminal_token_has_a_logprob_in_a_completion(client):
    """lm-eval takes the last token for a generated one, and what precedes it for the prompt."""
    prompt = tokens_of("<|bos|>silence<|assistant_start|>")
    choice = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, logprobs=1).choices[0]
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("", "stop", ["<|assistant_end|>"])


# -----------------------------------------------------------------------------
# Access from elsewhere


def test_an_api_key_is_asked_of_all_clients_and_of_browsers_as_a_password():
    headers = ("Bearer k3", "Bearer k3y!", "k3y", "Basic !", "Basic é".encode("latin-1"))
    wrong = [{}, {"auth": ("k3y", "")}, *({"headers": {"Authorization": header}} for header in headers)]
    with serving(ScriptedEngine(), api_key="k3y") as site:
        for path in ("/", "/v1/models", "/stats"):
            for access in wrong:
                response = site.get(path, **access)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"].startswith("Basic ")
            for access in ({"headers": {"Authorization": "Bearer k3y"}}, {"auth": ("me", "k3y")}):
                assert site.get(path, **access).status_code == 200
        for route in ALL:
            error_of(site.ask(path=route), 401)
        assert site.get("/health").status_code == 200
        assert ask(site.openai.with_options(api_key="k3y")).choices[0].message.content == "hello"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            ask(site.openai.with_options(api_key="other"))


def test_pages_of_this_machine_and_of_allowed_origins_may_use_the_api():
    with serving(ScriptedEngine(), origins=["https://my.site"]) as site:
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
        for origin in ("https://my.site", "http://localhost:3000", "http://127.0.0.1", "https://[::1]:8"):
            response = site.client.options(V1, headers={**preflight, "Origin": origin})
            assert response.status_code == 200 and "x-stainless-os" in response.headers["access-control-allow-headers"]
            for response in (site.client.get("/v1/models", headers={"Origin": origin}),
                             site.client.post(V1, json={}, headers={"Origin": origin})):  # fmt: skip
                assert response.headers["access-control-allow-origin"] == origin
        for origin in ("https://evil.site", "https://my.site.evil", "http://localhost.evil", "http://127.0.0.1:80@evil", "null"):
            response = site.client.options(V1, headers={**preflight, "Origin": origin})
            assert response.status_code == 400 and "access-control-allow-origin" not in response.headers


def test_head_requests(site):
    for path in ("/", "/health"):
        head, get = site.client.head(path), site.get(path)
        assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(get.content))
