"""The sample world tells the truth, is deterministic, says each fact often, and keeps the quiz's wording secret.

The task's conversations are well formed and keep off the quiz; its checker is strict and fair.
"""

import calendar
import random
import re
import string
from collections import Counter

import pyarrow.parquet as pq
import pytest

from nanochat import sample_world
from nanochat.calculator import use_calculator
from nanochat.sample_world import KIND, KINDS, WORLD, ask, documents, prose, quiz, sentence, write_shards
from tasks.sample_world import ARITHMETIC, SMALL_TALK, SampleWorld, is_right

SIZE = 4_000_000  # characters, about an eighth of the corpus


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(documents(size=SIZE))


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return list(SampleWorld("train"))


def held_out_uses(texts: list[str]) -> list[str]:
    """The held-out templates that occur in any of the texts, whatever their slots, whatever the case."""
    texts = [text.lower() for text in texts]
    found = []
    for template in (template for kind in KINDS for template in kind.held_out):
        literals = [literal.lower() for literal, *_ in string.Formatter().parse(template)]
        pattern = re.compile("[^\n?!]{1,40}?".join(map(re.escape, literals)))
        longest = max(literals, key=len)
        found += [template for text in texts if longest in text and pattern.search(text)][:1]
    return found


# -----------------------------------------------------------------------------
# The facts


def test_every_fact_has_the_slots_of_its_templates_and_a_question_has_one_answer():
    for kind in KINDS:
        for template in [*kind.statements, *kind.questions, *kind.held_out, kind.follow_up]:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}
            assert slots and all(slots <= set(fact) for fact in kind.facts), template
        assert all(f"{{{kind.answer}}}" in statement for statement in kind.statements), kind.name
        for template in kind.questions + kind.held_out:
            assert f"{{{kind.answer}}}" not in template
            answers = {}
            for fact in kind.facts:
                assert answers.setdefault(template.format(**fact), fact[kind.answer]) == fact[kind.answer], template


def test_calendars_agree_with_the_standard_library():
    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    for fact in KIND["two days"].facts:
        start = days.index(fact["yesterday"])
        assert (fact["today"], fact["tomorrow"]) == (days[(start + 1) % 7], days[(start + 2) % 7])
    for fact in KIND["month after"].facts:
        assert fact["next"] == months[(months.index(fact["month"]) + 1) % 12]


# -----------------------------------------------------------------------------
# The corpus


def test_arithmetic_counting_and_sorting_in_the_corpus_are_right(corpus):
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    text = "\n".join(corpus)
    sums = re.findall(r"(?<![\w*+.-] )(?<![\w*+.-])(\d+) ([-+*]) (\d+) = (\d+)", text)
    assert len(sums) > 5000
    assert all(operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)
    equations = re.findall(r"If (\d+)\*x \+ (\d+) = (\d+), then x (?:is|=) (\d+)\.", text)
    assert len(equations) > 1000
    assert all(int(a) * int(x) + int(b) == int(c) for a, b, c, x in equations)
    counts = re.findall(r"Counting from (\d+) to (\d+)(?: by (\d+))?: ([\d, ]+)\.", text)
    assert len(counts) > 50
    for start, end, step, numbers in counts:
        assert numbers == ", ".join(map(str, range(int(start), int(end) + 1, int(step or 1))))
    orders = re.findall(r"In the order of the alphabet, ([a-z, ]+) become ([a-z, ]+)\.", text)
    assert orders and all(sorted(before.split(", ")) == after.split(", ") for before, after in orders)


def test_every_fact_is_said(corpus):
    text = "\n".join(corpus)
    for kind in KINDS:
        for fact in kind.facts:
            assert sum(text.count(sentence(template, fact)) for template in kind.statements) >= 10, fact


def test_documents_have_the_length_of_documents_and_are_text(corpus):
    lengths = [len(document) for document in corpus]
    assert abs(sum(lengths) - SIZE) < 5000
    assert sum(250 <= length <= 3300 for length in lengths) >= 0.99 * len(lengths)
    assert all(document == document.strip() and "{country}" not in document for document in corpus)
    assert len(set(corpus)) >= 0.99 * len(corpus)


def test_no_held_out_phrasing_is_in_the_corpus_or_the_training_conversations(corpus, train):
    assert "Name the capital city of {country}." in held_out_uses(["Well. name the capital city of New Zealand. Yes."])
    texts = [*corpus, *(str(message["content"]) for conversation in train for message in conversation["messages"])]
    assert held_out_uses(texts) == []
    assert not any(question.text in "\n".join(texts) for question in quiz())


def test_prose_says_nothing_twice():
    counts = Counter(paragraph for document in prose(1) for paragraph in document.split("\n\n"))
    assert sum(map(len, counts)) > 500_000
    assert max(counts.values()) == 1
    assert not any(">>>" in paragraph or paragraph[-1] not in ".:!?)" for paragraph in counts), "code or a heading"


def test_shards_hold_the_corpus_of_their_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_world, "PROSE_MODULES", ["textwrap", "heapq"])
    paths = write_shards(tmp_path / "new", seed=3, size=10_000_000)
    assert sorted((tmp_path / "new").iterdir()) == paths
    assert [path.name for path in paths] == [f"shard_{index:05d}.parquet" for index in range(8)]
    files = [pq.ParquetFile(path) for path in paths]
    assert all(file.schema_arrow.names == ["text"] for file in files)
    sizes = [[file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in files]
    assert all(all(rows == 1024 for rows in groups[:-1]) and 0 < groups[-1] <= 1024 for groups in sizes)
    texts = [text for file in files for text in file.read()["text"].to_pylist()]
    assert texts == list(documents(3, 10_000_000)) != list(documents(4, 10_000_000))


# -----------------------------------------------------------------------------
# The task's conversations


def test_training_conversations_alternate_and_vary(train):
    assert len(train) == 4000
    for conversation in train:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"] for message in conversation["messages"])
    turns = [len(conversation["messages"]) // 2 for conversation in train]
    assert 0.3 < sum(turn == 1 for turn in turns) / len(turns) < 0.7 and sum(turn >= 4 for turn in turns) > 200
    texts = {str(message["content"]) for conversation in train for message in conversation["messages"]}
    for topic in [*SMALL_TALK.values(), *WORLD["general"].values()]:
        assert texts >= {*topic["said"], *topic["replies"]}
    assert texts >= {SampleWorld.examples[0], SampleWorld.examples[3]} and any('"strawberry".count("r")' in text for text in texts)


def test_tool_calls_and_replies_to_questions_are_right(train):
    questions = [ask(random.Random(0), kind, fact, [t]) for kind in KINDS for fact in kind.facts for t in kind.questions]
    by_text = {question.text: question for question in questions}
    calls = replies = 0
    for conversation in train:
        for user, assistant in zip(conversation["messages"][::2], conversation["messages"][1::2]):
            if isinstance(assistant["content"], list):
                call, output, text = assistant["content"]
                assert str(use_calculator(call["text"])) == output["text"] in text["text"]
                calls += 1
            elif question := by_text.get(user["content"]):
                assert is_right(question.kind, question.text, question.answer, assistant["content"]), (user, assistant)
                replies += 1
    assert calls > 500 and replies > 3000


def test_an_example_follows_from_its_index():
    assert list(SampleWorld("train", size=50)) == list(SampleWorld("train", stop=50))
    assert list(SampleWorld("test")) == list(SampleWorld("test"))
    assert SampleWorld("questions")[7] == SampleWorld("questions", size=9)[7]


def test_questions_for_practice_are_in_training_phrasings_and_those_of_a_quiz_in_others():
    practice, test = SampleWorld("questions", size=600, kinds=ARITHMETIC), SampleWorld("test", size=50, kinds=ARITHMETIC)
    for task, size, phrasings in ((practice, 600, "questions"), (test, 50, "held_out")):
        assert len(task) == size and {example["kind"] for example in task} == set(ARITHMETIC)
        for example in task:
            question, reply = (message["content"] for message in example["messages"])
            assert task.reward(example, reply) == 1.0 and task.reward(example, "I do not know.") == 0.0
            kind = KIND[example["kind"]]
            assert question in {sentence(template, fact) for fact in kind.facts for template in getattr(kind, phrasings)}


# -----------------------------------------------------------------------------
# The quiz


def test_the_quiz_is_balanced_and_asks_what_the_question_does_not_say():
    counts = Counter(question.kind for question in quiz())
    assert len(quiz()) == len({question.text for question in quiz()}) == 200
    assert set(counts) == set(KIND) and max(counts.values()) - min(counts.values()) <= 1


def test_the_quiz_accepts_its_replies_and_neither_silence_nor_an_echo_nor_every_answer_at_once():
    for conversation in (task := SampleWorld("test")):
        question, reply = (message["content"] for message in conversation["messages"])
        assert task.evaluate(conversation, reply) and task.evaluate(conversation, conversation["answer"])
        kind = KIND[conversation["kind"]]
        everything = ", ".join(fact[kind.answer] for fact in kind.facts)
        assert not any(task.evaluate(conversation, wrong) for wrong in ("", question, everything))


@pytest.mark.parametrize("kind, question, answer, right, wrong", [
    ("capital", "Name the capital city of France.", "Paris", ["The capital of France is Paris.", "paris"],
     ["The capital of France is London.", "Paris or London.", "Parisians live there."]),
    ("capital", "Name the capital city of Mexico.", "Mexico City", ["It is Mexico City."], []),
    ("symbol", "Name the chemical symbol of gold.", "Au", ["The chemical symbol of gold is Au."],
     ["The chemical symbol of gold is AU.", "The chemical symbol of gold is Ag."]),
    ("opposite", "Name the opposite of hot.", "cold", ["The opposite of hot is cold."],
     ["The opposite of hot is warm, not cold, but old."]),
    ("two days", "If it was Friday yesterday, which day will it be tomorrow?", "Sunday",
     ["If yesterday was Friday, then tomorrow will be Sunday."], ["If yesterday was Friday, then tomorrow will be Saturday."]),
    ("equation", "What must x be if 5*x + 3 = 13?", "2", ["If 5*x + 3 = 13, then x is 2."],
     ["If 5*x + 3 = 13, then x is 12.", "x is 2 or 4."]),
    ("sum", "Name the sum of 5 and 7.", "12", ["5 + 7 = 12"], ["5 + 7 = 13"]),
    ("list", "Name the seasons of the year.", "spring, summer, autumn, winter",
     ["They are spring, summer, autumn and winter."], ["They are spring, autumn, summer, winter."]),
])  # fmt: skip
def test_is_right(kind, question, answer, right, wrong):
    assert all(is_right(kind, question, answer, reply) for reply in right)
    assert not any(is_right(kind, question, answer, reply) for reply in wrong)
