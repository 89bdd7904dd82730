"""The sample world tells the truth, is deterministic, says each fact often, and keeps the quiz's wording secret."""

import calendar
import re
import string
from collections import Counter

import pyarrow.parquet as pq
import pytest

from nanochat import sample_world
from nanochat.sample_world import KIND, KINDS, TABLES, documents, paragraphs, prose, questions, write_shards

SIZE = 4_000_000  # characters, about an eighth of the corpus


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(documents(size=SIZE))


@pytest.fixture
def little_prose(monkeypatch):
    monkeypatch.setattr(sample_world, "PROSE_MODULES", ["textwrap", "heapq"])


def held_out_uses(texts: list[str]) -> list[str]:
    """The held-out templates that occur in any of the texts, whatever their slots, whatever the case."""
    texts = [text.lower() for text in texts]
    found = []
    for kind in KINDS:
        for template in kind.held_out:
            literals = [literal.lower() for literal, *_ in string.Formatter().parse(template)]
            pattern = re.compile("[^\n?!]{1,40}?".join(map(re.escape, literals)))
            longest = max(literals, key=len)
            found += [template for text in texts if longest in text and pattern.search(text)][:1]
    return found


def test_held_out_uses_finds_what_it_looks_for():
    assert "Name the capital city of {country}." in held_out_uses(["Well. name the capital city of New Zealand. Yes."])
    assert held_out_uses(["What is the capital city of France?"]) == []


# -----------------------------------------------------------------------------
# The facts


def test_every_fact_has_the_slots_that_its_templates_name():
    for kind in KINDS:
        for template in [*kind.statements, *kind.questions, *kind.held_out, kind.follow_up]:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}
            assert slots and all(slots <= set(fact) for fact in kind.facts), template
        assert all(f"{{{kind.answer}}}" in statement for statement in kind.statements), kind.name
        assert not any(f"{{{kind.answer}}}" in question for question in kind.questions + kind.held_out), kind.name


def test_a_question_has_one_answer():
    for kind in KINDS:
        for template in kind.questions + kind.held_out:
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


def test_all_arithmetic_in_the_corpus_is_right(corpus):
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    text = "\n".join(corpus)
    sums = re.findall(r"(?<![\w*+.-] )(?<![\w*+.-])(\d+) ([-+*]) (\d+) = (\d+)", text)
    assert len(sums) > 5000
    assert all(operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)
    equations = re.findall(r"If (\d+)\*x \+ (\d+) = (\d+), then x (?:is|=) (\d+)\.", text)
    assert len(equations) > 1000
    assert all(int(a) * int(x) + int(b) == int(c) for a, b, c, x in equations)
    assert ("5", "3", "13", "2") in equations


def test_counting_and_sorting_are_right(corpus):
    text = "\n".join(corpus)
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
            assert sum(text.count(sample_world.sentence(template, fact)) for template in kind.statements) >= 10, fact


def test_documents_have_the_length_of_documents_and_are_text(corpus):
    lengths = [len(document) for document in corpus]
    assert abs(sum(lengths) - SIZE) < 5000
    assert sum(250 <= length <= 3300 for length in lengths) >= 0.99 * len(lengths)
    assert all(document == document.strip() and "{country}" not in document for document in corpus)
    assert len(set(corpus)) >= 0.99 * len(corpus)


def test_no_held_out_phrasing_is_in_the_corpus_or_among_the_training_questions(corpus):
    assert held_out_uses([*corpus, *(question.text for question in questions("train"))]) == []
    text = "\n".join(corpus)
    assert not any(question.text in text for question in questions("test"))


def test_the_corpus_follows_from_its_seed(little_prose):
    first, again, other = (list(documents(seed, 100_000)) for seed in (1, 1, 2))
    assert first == again != other


# -----------------------------------------------------------------------------
# Prose


def test_paragraphs_keep_prose_and_drop_code():
    text = """Return the sum of all the numbers that
        were given, as a float.

        >>> total([1, 2, 3]) is equal to the number six.
        6

        total(a, b) -> c[0], d[1]: {x = 2}

        Heading without an end

        A second paragraph with ``marks`` of *emphasis* that are taken away.
        """
    assert list(paragraphs(text)) == [
        "Return the sum of all the numbers that were given, as a float.",
        "A second paragraph with marks of emphasis that are taken away.",
    ]


def test_prose_says_nothing_twice():
    counts = Counter(paragraph for document in prose(1) for paragraph in document.split("\n\n"))
    assert sum(map(len, counts)) > 500_000
    assert max(counts.values()) == 1


# -----------------------------------------------------------------------------
# Shards


def test_write_shards(tmp_path, little_prose):
    paths = write_shards(tmp_path / "new", seed=3, size=10_000_000)
    assert sorted((tmp_path / "new").iterdir()) == paths
    assert [path.name for path in paths] == [f"shard_{index:05d}.parquet" for index in range(8)]
    files = [pq.ParquetFile(path) for path in paths]
    assert all(file.schema_arrow.names == ["text"] for file in files)
    sizes = [[file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in files]
    assert all(all(rows == 1024 for rows in groups[:-1]) and 0 < groups[-1] <= 1024 for groups in sizes)
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    assert [text for file in files for text in file.read()["text"].to_pylist()] == list(documents(3, 10_000_000))


# -----------------------------------------------------------------------------
# Questions


def test_the_quiz_is_balanced_and_asks_what_the_question_does_not_say():
    quiz = questions("test")
    counts = Counter(question.kind for question in quiz)
    assert len(quiz) == len({question.text for question in quiz}) == 200
    assert set(counts) == set(KIND) and max(counts.values()) - min(counts.values()) <= 1
    assert all(question.answer not in question.text for question in quiz)
    assert all(question.answer.lower() in question.reply.lower() for question in quiz)
    assert quiz == questions("test")


def test_the_training_questions_cover_every_fact_in_every_phrasing():
    train = questions("train")
    assert len(train) == sum(len(kind.facts) * len(kind.questions) for kind in KINDS)
    assert {(q.kind, q.answer) for q in questions("test")} <= {(q.kind, q.answer) for q in train}
