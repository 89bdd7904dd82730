"""SampleWorld's conversations are well formed and keep off the quiz; its checker is strict and fair."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample_world import held_out_uses

from nanochat.calculator import use_calculator
from nanochat.sample_world import KIND, KINDS, WORLD, ask, sentence
from tasks.sample_world import ARITHMETIC, SMALL_TALK, SampleWorld, is_right, words


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(SampleWorld("train"))


@pytest.fixture(scope="module")
def quiz() -> SampleWorld:
    return SampleWorld("test")


def test_training_conversations_alternate_and_end_with_the_assistant(train):
    assert len(train) == 4000
    for conversation in train:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"] for message in conversation["messages"])


def test_there_are_single_and_multi_turn_conversations_and_small_talk(train):
    turns = [len(conversation["messages"]) // 2 for conversation in train]
    assert 0.3 < sum(turn == 1 for turn in turns) / len(turns) < 0.7
    assert sum(turn >= 4 for turn in turns) > 200
    texts = {str(message["content"]) for conversation in train for message in conversation["messages"]}
    for topic in [*SMALL_TALK.values(), *WORLD["general"].values()]:
        assert texts >= {*topic["said"], *topic["replies"]}
    assert texts >= {SampleWorld.examples[0], SampleWorld.examples[3]} and any("'strawberry'.count('r')" in text for text in texts)


def test_tool_calls_are_right_and_are_what_the_calculator_answers(train):
    calls = [message["content"] for conversation in train for message in conversation["messages"] if isinstance(message["content"], list)]
    assert len(calls) > 500
    for call, output, text in calls:
        assert str(use_calculator(call["text"])) == output["text"] in text["text"]


def test_every_training_reply_to_a_question_as_asked_is_right(train):
    by_text = {}
    for kind in KINDS:
        for fact in kind.facts:
            for template in kind.questions:
                question = ask(random.Random(0), kind, fact, [template])
                by_text[question.text] = question
    checked = 0
    for conversation in train:
        for user, assistant in zip(conversation["messages"][::2], conversation["messages"][1::2]):
            question = by_text.get(user["content"])
            if question:
                checked += 1
                assert is_right(question.kind, question.text, question.answer, assistant["content"]), (user, assistant)
    assert checked > 3000


def test_no_held_out_phrasing_is_in_the_train_split(train, quiz):
    texts = [str(message["content"]) for conversation in train for message in conversation["messages"]]
    assert held_out_uses(texts) == []
    asked = {conversation["messages"][0]["content"] for conversation in quiz}
    assert not asked & set(texts)


def test_an_example_follows_from_its_index(quiz):
    assert list(SampleWorld("train", size=50)) == list(SampleWorld("train", stop=50))
    assert list(quiz) == list(SampleWorld("test"))
    assert SampleWorld("questions")[7] == SampleWorld("questions", size=9)[7]


def test_the_quiz_accepts_its_own_replies_and_bare_answers(quiz):
    for conversation in quiz:
        assert quiz.evaluate(conversation, conversation["messages"][1]["content"])
        assert quiz.evaluate(conversation, conversation["answer"])


def test_the_quiz_accepts_neither_silence_nor_an_echo_nor_every_answer_at_once(quiz):
    for conversation in quiz:
        assert not quiz.evaluate(conversation, "")
        assert not quiz.evaluate(conversation, conversation["messages"][0]["content"])
        everything = ", ".join(fact[KIND[conversation["kind"]].answer] for fact in KIND[conversation["kind"]].facts)
        assert not quiz.evaluate(conversation, everything)


@settings(max_examples=300, deadline=None)
@given(index=st.integers(0, 199), seed=st.integers(0, 10**6))
def test_another_facts_reply_is_wrong(index, seed):
    quiz = SampleWorld("test")
    conversation, rng = quiz[index], random.Random(seed)
    kind = KIND[conversation["kind"]]
    other = ask(rng, kind, rng.choice(kind.facts), kind.questions)
    expected = other.answer == conversation["answer"]
    got = quiz.evaluate(conversation, other.reply)
    # A reply that only happens to name the answer, "Monday comes before Tuesday", may pass; none that lacks it may.
    assert got == expected or words(conversation["answer"]) in words(other.reply)


@pytest.mark.parametrize(
    "kind, question, answer, reply, right",
    [
        ("capital", "Name the capital city of France.", "Paris", "The capital of France is Paris.", True),
        ("capital", "Name the capital city of France.", "Paris", "paris", True),
        ("capital", "Name the capital city of France.", "Paris", "The capital of France is London.", False),
        ("capital", "Name the capital city of France.", "Paris", "Paris or London.", False),
        ("capital", "Name the capital city of France.", "Paris", "Parisians live there.", False),
        ("capital", "Name the capital city of Mexico.", "Mexico City", "It is Mexico City.", True),
        ("symbol", "Name the chemical symbol of gold.", "Au", "The chemical symbol of gold is Au.", True),
        ("symbol", "Name the chemical symbol of gold.", "Au", "The chemical symbol of gold is AU.", False),
        ("symbol", "Name the chemical symbol of gold.", "Au", "The chemical symbol of gold is Ag.", False),
        ("opposite", "Name the opposite of hot.", "cold", "The opposite of hot is cold.", True),
        ("opposite", "Name the opposite of hot.", "cold", "The opposite of hot is warm, not cold, but old.", False),
        ("two days", "If it was Friday yesterday, which day will it be tomorrow?", "Sunday",
         "If yesterday was Friday, then tomorrow will be Sunday.", True),
        ("two days", "If it was Friday yesterday, which day will it be tomorrow?", "Sunday",
         "If yesterday was Friday, then tomorrow will be Saturday.", False),
        ("equation", "What must x be if 5*x + 3 = 13?", "2", "If 5*x + 3 = 13, then x is 2.", True),
        ("equation", "What must x be if 5*x + 3 = 13?", "2", "If 5*x + 3 = 13, then x is 12.", False),
        ("equation", "What must x be if 5*x + 3 = 13?", "2", "x is 2 or 4.", False),
        ("sum", "Name the sum of 5 and 7.", "12", "5 + 7 = 12", True),
        ("sum", "Name the sum of 5 and 7.", "12", "5 + 7 = 13", False),
        ("list", "Name the seasons of the year.", "spring, summer, autumn, winter",
         "They are spring, summer, autumn and winter.", True),
        ("list", "Name the seasons of the year.", "spring, summer, autumn, winter",
         "They are spring, autumn, summer, winter.", False),
        ("home", "Name the home of a dog.", "kennel", "A dog lives in a kennel.", True),
    ],
)  # fmt: skip
def test_is_right(kind, question, answer, reply, right):
    assert is_right(kind, question, answer, reply) == right


def test_questions_for_practice_are_in_training_phrasings_and_can_be_checked():
    task = SampleWorld("questions", size=600, kinds=ARITHMETIC)
    assert len(task) == 600 and {task[i]["kind"] for i in range(600)} == set(ARITHMETIC)
    for example in task:
        question, reply = (message["content"] for message in example["messages"])
        assert task.reward(example, reply) == 1.0 and task.reward(example, "I do not know.") == 0.0
        kind = KIND[example["kind"]]
        assert question in {sentence(template, fact) for fact in kind.facts for template in kind.questions}


def test_a_quiz_on_some_kinds():
    quiz = SampleWorld("test", size=50, kinds=ARITHMETIC)
    assert len(quiz) == 50 and {example["kind"] for example in quiz} == set(ARITHMETIC)
    held_out = {sentence(t, fact) for name in ARITHMETIC for fact in KIND[name].facts for t in KIND[name].held_out}
    assert {example["messages"][0]["content"] for example in quiz} <= held_out
