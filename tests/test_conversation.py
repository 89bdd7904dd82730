"""Conversations to ids and masks, checked by hand: the fake tokenizer has one id per character.

Its ids are the characters themselves and the names of the special tokens, so an expected rendering
can be written out and read.
"""

import pytest

from nanochat.common import UserError
from nanochat.conversation import render_conversation, render_for_completion


class CharTokenizer:
    def encode(self, text):
        return list(text)

    def encode_special(self, name):
        assert name.startswith("<|") and name.endswith("|>")
        return name.strip("<|>")

    def get_bos_token_id(self):
        return "bos"


TOKENIZER = CharTokenizer()


def talk(*contents, system=None):
    """A conversation from contents in turns, user first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


def render(conversation, **options):
    """Pairs, as "token mask" strings, of a rendering."""
    ids, mask = render_conversation(TOKENIZER, conversation, **options)
    assert len(ids) == len(mask)
    return [f"{token} {learned}" for token, learned in zip(ids, mask)]


def test_one_exchange():
    assert render(talk("a?", "b")) == [
        "bos 0",
        "user_start 0", "a 0", "? 0", "user_end 0",
        "assistant_start 0", "b 1", "assistant_end 1",
    ]  # fmt: skip


def test_two_exchanges_have_one_bos_and_every_answer_is_learnt():
    assert render(talk("a", "b", "c", "d")) == [
        "bos 0",
        "user_start 0", "a 0", "user_end 0", "assistant_start 0", "b 1", "assistant_end 1",
        "user_start 0", "c 0", "user_end 0", "assistant_start 0", "d 1", "assistant_end 1",
    ]  # fmt: skip


def test_tool_calls_are_learnt_with_their_delimiters_and_tool_output_is_not():
    parts = [
        {"type": "text", "text": "x="},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "!"},
    ]
    assert render(talk("q", parts)) == [
        "bos 0",
        "user_start 0", "q 0", "user_end 0",
        "assistant_start 0",
        "x 1", "= 1",
        "python_start 1", "1 1", "+ 1", "1 1", "python_end 1",
        "output_start 0", "2 0", "output_end 0",
        "! 1",
        "assistant_end 1",
    ]  # fmt: skip


def test_system_message_is_merged_into_the_first_user_message_with_a_blank_line():
    conversation = talk("hi", "yo", "again", "so", system="Be kind.")
    before = repr(conversation)
    assert render(conversation) == render(talk("Be kind.\n\nhi", "yo", "again", "so"))
    assert repr(conversation) == before, "the conversation given must stay as it was"


def test_empty_texts_still_have_their_delimiters():
    assert render(talk("", "")) == render(talk("", [])) == [
        "bos 0", "user_start 0", "user_end 0", "assistant_start 0", "assistant_end 1",
    ]  # fmt: skip


def test_a_conversation_that_ends_with_the_user_has_nothing_to_learn_there():
    assert render(talk("a", "b", "c"))[-3:] == ["user_start 0", "c 0", "user_end 0"]


def test_truncation():
    whole = render(talk("a" * 3000, "b"), max_tokens=None)
    assert len(whole) == 1 + 3002 + 3
    assert render(talk("a" * 3000, "b")) == whole[:2048]
    assert render(talk("a" * 3000, "b"), max_tokens=1) == ["bos 0"]
    for limit in (0, -1):
        with pytest.raises(UserError, match="max_tokens"):
            render(talk("a", "b"), max_tokens=limit)


def test_completion_prompt_drops_the_reference_answer():
    prompt = ["bos", "user_start", "a", "user_end", "assistant_start"]
    assert render_for_completion(TOKENIZER, talk("a", "b")) == prompt
    assert render_for_completion(TOKENIZER, talk("a")) == prompt
    assert render_for_completion(TOKENIZER, talk("a", [{"type": "python", "text": "1"}])) == prompt


def test_completion_prompt_keeps_earlier_turns_and_is_never_cut():
    conversation = talk("a", "b", "c" * 5000, "d", system="s")
    expected = render_conversation(TOKENIZER, talk("s\n\na", "b", "c" * 5000), max_tokens=None)[0]
    assert render_for_completion(TOKENIZER, conversation) == [*expected, "assistant_start"]
    assert len(conversation["messages"]) == 5, "the conversation given must stay as it was"


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "messages, where",
    [
        ([ASSISTANT], r"messages\[0\].*assistant.*'user'"),
        ([USER, USER], r"messages\[1\].*'user'.*'assistant'"),
        ([USER, ASSISTANT, ASSISTANT], r"messages\[2\]"),
        ([SYSTEM, ASSISTANT], r"messages\[1\]"),
        ([USER, SYSTEM, ASSISTANT], r"messages\[1\].*system"),
        ([SYSTEM, SYSTEM, USER], r"messages\[1\]"),
        ([SYSTEM], r"messages\[0\].*system"),
        ([USER, {"role": "robot", "content": "x"}], r"messages\[1\].*robot"),
        ([USER, {"role": ["assistant"], "content": "x"}], r"messages\[1\]"),
        ([USER, {"content": "x"}], r"messages\[1\]"),
        ([USER, {"role": "assistant"}], r"messages\[1\]"),
        ([USER, "hello"], r"messages\[1\].*hello"),
        ([{"role": "user", "content": None}], r"messages\[0\].*None"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"messages\[0\].*string"),
        ([{"role": "system", "content": 3}, USER], r"messages\[0\].*3"),
        ([USER, {"role": "assistant", "content": 7}], r"messages\[1\].*7"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], r"messages\[1\], part 0.*image"),
        ([USER, {"role": "assistant", "content": [{"type": [], "text": "x"}]}], r"messages\[1\], part 0"),
        ([USER, {"role": "assistant", "content": ["x"]}], r"messages\[1\], part 0"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "python"}]}], r"part 1"),
    ],
)
def test_bad_messages_are_named(messages, where):
    with pytest.raises(ValueError, match=where):
        render_conversation(TOKENIZER, {"messages": messages})


@pytest.mark.parametrize("conversation", [{}, {"messages": []}, {"messages": None}, {"messages": "hi"}, [], None, "hi"])
def test_what_is_no_conversation_is_refused(conversation):
    for render_it in (render_conversation, render_for_completion):
        with pytest.raises(ValueError, match="at least one message"):
            render_it(TOKENIZER, conversation)


@pytest.mark.parametrize("messages", [[ASSISTANT], [SYSTEM, ASSISTANT], [USER, ASSISTANT, ASSISTANT]])
def test_completion_needs_a_user_message_to_answer(messages):
    with pytest.raises(ValueError, match=r"messages\[\d\]"):
        render_for_completion(TOKENIZER, {"messages": messages})


def test_long_values_are_shortened_in_errors():
    with pytest.raises(ValueError) as error:
        render_conversation(TOKENIZER, {"messages": [{"role": "user", "content": ["x" * 10_000]}]})
    assert len(str(error.value)) < 200
