"""Spelling and counting letters: every generated answer is checked by counting again."""

import pytest

from nanochat.calculator import use_calculator
from tasks.common import check_conversation
from tasks.spellingbee import QUESTIONS, SimpleSpelling, SpellingBee, load_words


@pytest.fixture(autouse=True)
def words(hub, base_dir):
    """The word list comes from the fake hub."""


def prompt(conversation) -> str:
    return conversation["messages"][0]["content"]


def test_words_of_the_splits_are_disjoint():
    train, test = set(load_words("train")), set(load_words("test"))
    assert not train & test and len(train | test) == 234
    assert all(word.isascii() and word.isalpha() and word.islower() for word in train | test)


def test_simple_spelling():
    task = SimpleSpelling(size=300, split="train")
    assert len(task) == 300 and list(task) == list(SimpleSpelling(size=300, split="train"))
    for conversation in task:
        check_conversation(conversation)
        word = prompt(conversation).removeprefix("Spell the word: ")
        assert conversation["messages"][1]["content"] == f"{word}:" + ",".join(word)
    assert len({prompt(conversation) for conversation in task}) > 100
    assert not set(map(prompt, task)) & set(map(prompt, SimpleSpelling(size=300, split="test")))


def test_spelling_bee():
    task = SpellingBee(size=400, split="test")
    assert len(task) == 400 and (task.eval_type, task.baseline) == ("generative", 0.0)
    assert [task[i] for i in range(5)] == list(SpellingBee(size=5, split="test")) != list(SpellingBee(size=5))
    answers = set()
    for conversation in task:
        check_conversation(conversation)
        parts = conversation["messages"][-1]["content"]
        by_hand, call, output, conclusion = (part["text"] for part in parts)
        word, letter = call.removeprefix("'").removesuffix("')").split("'.count('")
        count = sum(c == letter for c in word)
        assert use_calculator(call) == count == int(output)
        assert f"{word}:{','.join(word)}\n" in by_hand and f"I find {count}." in by_hand
        steps = [line.split() for line in by_hand.splitlines() if line[:1].isdigit()]
        assert "".join(character for _, character, _ in steps) == word and int(steps[-1][2]) == count
        assert word in prompt(conversation).lower() and letter in prompt(conversation).lower()
        assert task.evaluate(conversation, by_hand + conclusion) and task.evaluate(conversation, f"#### {count}")
        assert not task.evaluate(conversation, f"#### {count + 1}") and not task.evaluate(conversation, str(count))
        answers.add(count)
    assert answers >= {0, 1, 2}


def test_spelling_bee_asks_in_many_ways():
    assert len(QUESTIONS) == len(set(QUESTIONS)) > 40
    assert all(question.count("{c}") == question.count("{w}") == 1 for question in QUESTIONS)
    questions = [prompt(conversation) for conversation in SpellingBee(size=500)]
    assert len(set(questions)) == 500
    assert all(0 < sum(sign in question for question in questions) < 500 for sign in "'\"`?.")
    assert 0 < sum(question == question.lower() for question in questions) < 500
