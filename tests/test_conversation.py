"""Conversations to ids and masks, shown as characters and the names of the special tokens."""

import pytest
from tiny import BYTES

from nanochat.common import UserError
from nanochat.conversation import render_conversation, render_for_completion

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def talk(*contents, system=None):
    """A conversation from contents in turns, user first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


def names(ids):
    return [BYTES.id_to_token(id).strip("<|>") for id in ids]


def render(conversation, **options):
    """Pairs, as "token mask" strings, of a rendering."""
    ids, mask = render_conversation(BYTES, conversation, **options)
    return [f"{token} {supervised}" for token, supervised in zip(names(ids), mask, strict=True)]


def test_answers_and_tool_calls_are_supervised_and_the_output_of_tools_is_not():
    parts = [
        {"type": "text", "text": "x="},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "!"},
    ]
    assert render(talk("a?", "b", "q", parts)) == [
        "bos 0",
        "user_start 0", "a 0", "? 0", "user_end 0",
        "assistant_start 0", "b 1", "assistant_end 1",
        "user_start 0", "q 0", "user_end 0",
        "assistant_start 0",
        "x 1", "= 1",
        "python_start 1", "1 1", "+ 1", "1 1", "python_end 1",
        "output_start 0", "2 0", "output_end 0",
        "! 1",
        "assistant_end 1",
    ]  # fmt: skip


def test_a_system_message_is_merged_into_the_first_user_message_with_a_blank_line():
    merged = render(talk("Be kind.\n\nhi", "yo", "again", "so"))
    assert render(talk("hi", "yo", "again", "so", system="Be kind.")) == merged


def test_truncation():
    whole = render(talk("a" * 3000, "b"), max_tokens=None)
    assert len(whole) == 1 + 3002 + 3
    assert render(talk("a" * 3000, "b")) == whole[:2048]
    assert render(talk("a" * 3000, "b"), max_tokens=1) == ["bos 0"]
    with pytest.raises(UserError, match="at least 1, not 0"):
        render(talk("a", "b"), max_tokens=0)


def test_a_completion_prompt_ends_where_the_reference_answer_starts_and_is_never_truncated():
    prompt = ["bos", "user_start", "a", "user_end", "assistant_start"]
    for conversation in (talk("a", "b"), talk("a"), talk("a", [{"type": "python", "text": "1"}])):
        assert names(render_for_completion(BYTES, conversation)) == prompt
    expected = render_conversation(BYTES, talk("s\n\na", "b", "c" * 5000), max_tokens=None)[0]
    conversation = talk("a", "b", "c" * 5000, "d", system="s")
    for _ in range(2):  # the argument is unchanged
        assert render_for_completion(BYTES, conversation) == [*expected, BYTES.encode_special("<|assistant_start|>")]


def reply(*parts):
    return [USER, {"role": "assistant", "content": list(parts)}]


@pytest.mark.parametrize("messages, where", [
    ([ASSISTANT], r"messages\[0\].*assistant.*'user'"),
    ([USER, USER], r"messages\[1\].*'user'.*'assistant'"),
    ([{"role": "system", "content": "s"}], r"messages\[0\].*system"),
    ([USER, "hello"], r"messages\[1\].*hello"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"messages\[0\].*string"),
    ([{"role": "user", "content": ["x" * 10_000]}], r"messages\[0\].{1,150}$"),  # long values are shortened
    ([{"role": "system", "content": 3}, USER], r"messages\[0\].*3"),
    (reply({"type": "image", "text": "x"}), r"messages\[1\], part 0.*image"),
    (reply({"type": [], "text": "x"}), r"messages\[1\], part 0"),
    (reply({"type": "text", "text": "x"}, {"type": "python"}), r"part 1"),
    ([], "at least one message"),
])  # fmt: skip
def test_a_malformed_message_is_named(messages, where):
    with pytest.raises(UserError, match=where):
        render_conversation(BYTES, {"messages": messages})


@pytest.mark.parametrize("conversation", [{}, [], None, {"messages": [ASSISTANT]}, {"messages": [USER, ASSISTANT, ASSISTANT]}])
def test_a_completion_needs_a_conversation(conversation):
    with pytest.raises(UserError, match=r"at least one message|messages\[\d\]"):
        render_for_completion(BYTES, conversation)
