"""/v1, as OpenAI's own Python client finds it."""

import asyncio

import openai
import pytest
from chat_server import ScriptedEngine, answering, serving

REPLIES = {
    "emoji": "né 👩‍🚀!",
    "sums": "It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.",
    "long": "x" * 1000,
    "count": "1, 2, 3, 4, 5",
}
MODEL = "sft-d2-step-8"


@pytest.fixture(scope="module")
def site():
    with serving(ScriptedEngine(answering(REPLIES))) as site:
        yield site


@pytest.fixture(scope="module")
def client(site):
    with openai.OpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, text="hi", **settings):
    return client.chat.completions.create(**{"model": MODEL, "messages": [{"role": "user", "content": text}], **settings})


# -----------------------------------------------------------------------------
# Models


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and model.object == "model"
    assert client.models.retrieve(MODEL) == model


@pytest.mark.parametrize("name", [MODEL, "sft", "sft-d2", "nanochat", "sft d2 step 8"])
def test_any_leading_part_of_the_name_will_do(client, name):
    assert ask(client, model=name).model == MODEL


@pytest.mark.parametrize("name", ["gpt-4o", "sft-d", "SFT", "a/b"])
def test_unknown_models_are_not_found(client, name):
    for work in (lambda: ask(client, model=name), lambda: client.models.retrieve(name)):
        with pytest.raises(openai.NotFoundError) as caught:
            work()
        assert caught.value.code == "model_not_found" and caught.value.param == "model" and MODEL in caught.value.message


# -----------------------------------------------------------------------------
# Answers


def test_a_whole_answer(client):
    answer = ask(client)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert (choice.index, choice.message.role, choice.message.content, choice.finish_reason) == (0, "assistant", "hello", "stop")
    assert answer.usage.completion_tokens == 5 and answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_a_streamed_answer(client):
    chunks = list(ask(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == list("hello")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["stop"]
    assert not any(chunk.usage for chunk in chunks)


def test_a_stream_tells_its_usage_when_asked(client):
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 5
    assert last.usage == ask(client).usage and not any(chunk.usage for chunk in chunks)


def test_the_stream_helper_of_the_client_reads_it(client):
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "emoji"}]) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == REPLIES["emoji"]
        assert stream.get_final_completion().choices[0].message.content == REPLIES["emoji"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_one_question(client, stream):
    if stream:
        heard = {}
        for chunk in ask(client, n=3, stream=True):
            for choice in chunk.choices:
                heard[choice.index] = heard.get(choice.index, "") + (choice.delta.content or "") + (choice.finish_reason or "")
        assert heard == dict.fromkeys(range(3), "hellostop")
    else:
        answer = ask(client, n=3)
        assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "hello") for i in range(3)]
        assert answer.usage.completion_tokens == 15


def test_an_answer_is_its_text_without_calls_of_the_calculator(client):
    assert ask(client, "sums").choices[0].message.content == "It is 42."


def test_stop_strings_end_the_answer_and_are_not_in_it(client, site):
    for stop, text in ((", 3", "1, 2"), ([", 4", "3"], "1, 2, "), (["absent"], "1, 2, 3, 4, 5"), (None, "1, 2, 3, 4, 5")):
        answer = ask(client, "count", stop=stop)
        assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "stop"
        chunks = list(ask(client, "count", stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert not site.engine.seqs  # what the engine would have written further was dropped


def test_length(client):
    for settings in ({"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_tokens": 99, "max_completion_tokens": 7}):
        answer = ask(client, "long", **settings)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 7
    assert ask(client, "long", max_tokens=100_000).choices[0].finish_reason == "length"  # the context is full


def test_settings_reach_the_engine(client, site):
    ask(client, temperature=0, top_p=0.5, seed=7, stop="x", extra_body={"top_k": 3, "unheard_of": {}}, user="me", presence_penalty=1)
    assert site.engine.asked[-1].settings == {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 7, "stop": ("x",), "sample_index": 0}
    seeds = {(ask(client), site.engine.asked[-1].settings["seed"])[1] for _ in range(3)}
    assert len(seeds) == 3


def test_messages_may_be_parts_and_a_system_message_comes_first(client, site):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts},
                {"role": "assistant", "content": "c"}, {"role": "user", "name": "me", "content": "d"}]
    client.chat.completions.create(model=MODEL, messages=messages)
    row = site.engine.asked[-1]
    said = site.engine.tokenizer.decode(row.tokens[: row.prompt_length])
    assert said == ("<|bos|><|user_start|>Be brief.\n\na\nb<|user_end|><|assistant_start|>c<|assistant_end|>"
                    "<|user_start|>d<|user_end|><|assistant_start|>")


def test_sixteen_at_once(site):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0) as client:

            async def streamed():
                return "".join([chunk.choices[0].delta.content or "" async for chunk in await ask(client, "emoji", stream=True)])

            async def whole():
                return (await ask(client, "emoji")).choices[0].message.content

            return await asyncio.gather(*(work() for work in [streamed, whole] * 8))

    assert asyncio.run(main()) == [REPLIES["emoji"]] * 16


# -----------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("settings, param", [
    ({"temperature": 2.5}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"), ({"n": 9}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"), ({"stop": ["a", 3]}, "stop[1]"), ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"), ({"model": 7}, "model"), ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}, "messages[1]"),
])  # fmt: skip
def test_bad_requests_name_the_field(client, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **settings)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_a_prompt_that_is_too_long(client, site):
    with pytest.raises(openai.BadRequestError, match="504 tokens.*400") as caught:
        ask(client, "x" * 500)
    assert caught.value.code == "context_length_exceeded"
    assert ask(client, "long" * 98 + "abc").usage.total_tokens == site.engine.context  # one place left is enough
