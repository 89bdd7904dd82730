"""The built-in corpus: a small textbook world, written by a seeded generator, and the quiz on it.

Every document is generated from the same thousand facts, in many phrasings, so that a small model that reads only a
part of the corpus meets each fact dozens of times, and what it has learned can be tested. Facts and phrasings are in
sample_world.json; here they become pages, exams, stories, dialogues and exercises. One part in twenty-five is prose
from the sources of Python's standard library, for natural variety.

Everything follows from the seed and the Python version, whose prose is quoted. The quoted modules are not imported.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

CORPUS_SIZE = 30_000_000  # characters
NUM_SHARDS = 8  # the last one is the validation split
ROW_GROUP_SIZE = 1024  # documents
DOCUMENT_LENGTHS = (300, 3000, 900)  # characters: minimum, maximum, mode
PROSE_SHARE = 0.04  # of the characters: all prose of the standard library, once
QUIZ_SIZE = 200

WORLD = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TABLES, STORY, DIALOGUE = WORLD["tables"], WORLD["story"], WORLD["dialogue"]
PROSE_MODULES = WORLD["prose_modules"]  # of the standard library

# -----------------------------------------------------------------------------
# Facts. A fact is a dict of slots: {"country": "France", "city": "Paris", "continent": "Europe"}

Fact = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of fact and its phrasings, templates over the slots of a fact.

    `statements[0]` is the canonical sentence; the first two serve as replies. Nothing that a model is trained on uses
    a `held_out` question, so a right answer to one shows that the fact was learned, not the question.
    """

    name: str
    answer: str  # the slot that answers every question of this kind
    facts: list[Fact]
    statements: list[str]
    questions: list[str]
    held_out: list[str]
    follow_up: str  # a question that refers to the one before it


def pairs(table: str, key: str, value: str) -> list[Fact]:
    """A fact for each entry of a table: {"gold": "Au"} -> [{"element": "gold", "symbol": "Au"}]."""
    return [{key: a, value: b} for a, b in TABLES[table].items()]


def neighbours(cycle: list[str], *slots: str) -> list[Fact]:
    """Each run of consecutive members of a cycle: seven facts for the days of the week."""
    starts = range(len(cycle))
    return [{slot: cycle[(start + i) % len(cycle)] for i, slot in enumerate(slots)} for start in starts]


DIGITS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
FACTS = {
    "countries": [
        {"country": country, "city": city, "continent": continent}
        for continent, capitals in TABLES["capitals"].items() for country, city in capitals.items()
    ],
    "elements": pairs("elements", "element", "symbol"),
    "planets": [{"planet": planet, "ordinal": ordinal} for planet, ordinal in zip(TABLES["planets"], TABLES["ordinals"])],
    "animals": [
        {"animal": f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}", "sound": sound, "home": home, "young": young}
        for animal, (sound, home, young) in TABLES["animals"].items()
    ],
    "opposites": [{"word": a, "opposite": b} for pair in TABLES["opposites"] for a, b in (pair, reversed(pair))],
    "colours": [{"thing": thing, "colour": colour} for colour, things in TABLES["colours"].items() for thing in things],
    "units": [{"whole": whole, "number": number, "parts": parts} for whole, (number, parts) in TABLES["units"].items()],
    "plurals": pairs("plurals", "singular", "plural"),
    "jobs": pairs("jobs", "job", "work"),
    "lists": [{"list": name, "members": ", ".join(members)} for name, members in TABLES["lists"].items()],
    "sums": [{"a": str(a), "b": str(b), "c": str(a + b)} for a, b in DIGITS],
    "differences": [{"a": str(a + b), "b": str(b), "c": str(a)} for a, b in DIGITS],
    "products": [{"a": str(a), "b": str(b), "c": str(a * b)} for a, b in DIGITS],
    "equations": [
        {"equation": f"{a}*x + {b} = {a * x + b}", "a": str(a), "b": str(b), "ax": str(a * x), "x": str(x)}
        for a in range(2, 7) for x in range(1, 7) for b in range(1, 6)  # so few that each is met dozens of times
    ],
}  # fmt: skip


def make_kind(name: str, facts: str, **phrasings) -> Kind:
    """`facts` is a name in FACTS, or a cycle and the slots of its neighbours: "days: today, tomorrow"."""
    table, _, slots = facts.partition(": ")
    return Kind(name, facts=neighbours(TABLES[table], *slots.split(", ")) if slots else FACTS[table], **phrasings)


KIND = {name: make_kind(name, **values) for name, values in WORLD["kinds"].items()}
KINDS = list(KIND.values())
KIND_WEIGHTS = [len(kind.facts) + 30 for kind in KINDS]  # a fact of a small kind is met more often


def sentence(template: str, slots: Fact) -> str:
    """`"{animal} {sound}."` with the slots of a dog -> `"A dog barks."`"""
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def pick_kind(rng: random.Random) -> Kind:
    return rng.choices(KINDS, KIND_WEIGHTS)[0]


def state(rng: random.Random, kind: Kind) -> str:
    """A fact of this kind as a statement. The canonical phrasing is at least twice as frequent as any other."""
    template = kind.statements[0] if rng.random() < 0.3 else rng.choice(kind.statements)
    return sentence(template, rng.choice(kind.facts))


def fill(texts: Iterator[str], length: int, separator: str = " ") -> str:
    """Join texts until `length` characters are reached (or the texts end)."""
    taken, total = [], 0
    while total < length and (text := next(texts, None)) is not None:
        taken.append(text)
        total += len(text) + len(separator)
    return separator.join(taken)


def forever(make: Callable[[], str]) -> Iterator[str]:
    while True:
        yield make()


# -----------------------------------------------------------------------------
# Documents of facts. Each writer takes a random generator and a length in characters.


def page(rng: random.Random, length: int) -> str:
    """A page about one kind of fact."""
    kind = pick_kind(rng)
    return fill(forever(lambda: state(rng, kind)), length)


def mixed_page(rng: random.Random, length: int) -> str:
    """Paragraphs of statements of all kinds."""
    statements = forever(lambda: state(rng, pick_kind(rng)))
    paragraphs = forever(lambda: fill(statements, rng.randint(150, 500)))
    return fill(paragraphs, length, "\n\n")


def entries(rng: random.Random, length: int) -> str:
    """An encyclopedia: all facts about one country, element or animal after the other."""
    kinds = [KIND[name] for name in rng.choice(WORLD["entries"])]
    facts = forever(lambda: rng.choice(kinds[0].facts))
    texts = (" ".join(sentence(rng.choice(kind.statements), fact) for kind in kinds) for fact in facts)
    return fill(texts, length, "\n")


def exam(rng: random.Random, length: int) -> str:
    """Questions with answers, on one kind of fact or on all."""
    asked = rng.choice([("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")])
    one_kind = pick_kind(rng) if rng.random() < 0.4 else None

    def exchange() -> str:
        kind = one_kind or pick_kind(rng)
        question = ask(rng, kind, rng.choice(kind.facts), kind.questions)
        return f"{asked[0]}{question.text}\n{asked[1]}{question.reply}"

    return fill(forever(exchange), length, "\n\n" if rng.random() < 0.5 else "\n")


def dialogue(rng: random.Random, length: int) -> str:
    """Two children ask each other what they know."""
    a, b = rng.sample(TABLES["names"], 2)

    def lines() -> Iterator[str]:
        yield f"{a}: {rng.choice(DIALOGUE['greetings']).format(b=b)}"
        yield f"{b}: Hello, {a}! I am fine. Ask me anything."
        while True:
            kind = pick_kind(rng)
            fact, other = rng.choice(kind.facts), rng.choice(kind.facts)
            yield f"{a}: {sentence(rng.choice(kind.questions), fact)}"
            yield f"{b}: {sentence(kind.statements[0], fact)}"
            if rng.random() < 0.4:
                yield f"{a}: {sentence(kind.follow_up, other)}"
                yield f"{b}: {sentence(kind.statements[0], other)}"
            if rng.random() < 0.3:
                yield f"{a}: {rng.choice(DIALOGUE['thanks']).format(b=b)}"

    goodbye = f"{a}: {rng.choice(DIALOGUE['goodbyes']).format(b=b, day=rng.choice(TABLES['days']))}"
    return fill(lines(), length, "\n") + "\n" + goodbye


def story(rng: random.Random, length: int) -> str:
    """Two friends, an animal and a thing; the facts that they learn are true in this world."""
    hero, friend = rng.sample(TABLES["names"], 2)
    slots = {"hero": hero, "friend": friend}
    for slot in ("day", "month", "place", "thing", "food", "colour", "animal"):
        slots[slot] = rng.choice(list(TABLES[f"{slot}s"]))
    slots["number"] = str(rng.randint(2, 9))

    def sentences() -> Iterator[str]:
        yield rng.choice(STORY["openings"]).format(**slots)
        while True:
            for event in rng.sample(STORY["events"], 2):
                yield event.format(**slots)
            kind = pick_kind(rng)
            fact = rng.choice(kind.facts)
            question = sentence(rng.choice(kind.questions), fact)
            yield rng.choice(STORY["lessons"]).format(question=question, fact=sentence(kind.statements[0], fact), **slots)

    return fill(sentences(), min(length, 1500)) + " " + rng.choice(STORY["endings"]).format(**slots)


# -----------------------------------------------------------------------------
# Exercises: tables, equations step by step, counting, sorting


def table(rng: random.Random) -> str:
    n, operator = rng.randint(1, 9), rng.choice("+-*")
    row = {"+": "{n} + {i} = {sum}", "-": "{sum} - {n} = {i}", "*": "{n} * {i} = {product}"}[operator]
    return ", ".join(row.format(n=n, i=i, sum=n + i, product=n * i) for i in range(1, 10)) + "."


def solution(rng: random.Random) -> str:
    """An equation solved step by step, ending in its canonical sentence."""
    slots = rng.choice(FACTS["equations"])
    steps = "Let us solve {equation}. Take {b} from both sides: {a}*x = {ax}. Divide by {a}: x = {x}. "
    return sentence(steps + KIND["equation"].statements[0], slots)


def counting(rng: random.Random) -> str:
    start, step, count = rng.randint(1, 20), rng.choice([1, 1, 1, 2, 5, 10]), rng.randint(4, 8)
    numbers = [start + step * i for i in range(count)]
    by = "" if step == 1 else f" by {step}"
    if rng.random() < 0.3:
        return f"Counting down from {numbers[-1]} to {start}{by}: {', '.join(map(str, reversed(numbers)))}."
    return f"Counting from {start} to {numbers[-1]}{by}: {', '.join(map(str, numbers))}."


def sorting(rng: random.Random) -> str:
    if rng.random() < 0.5:
        numbers = rng.sample(range(1, 30), rng.randint(3, 5))
        return f"Sorted by size, {', '.join(map(str, numbers))} become {', '.join(map(str, sorted(numbers)))}."
    words = rng.sample(list(TABLES["plurals"]), rng.randint(3, 4))
    return f"In the order of the alphabet, {', '.join(words)} become {', '.join(sorted(words))}."


def occurrences(letter: str, word: str) -> str:
    """How often a letter occurs in a word, as a sentence without its end."""
    count = word.count(letter)
    return f"The letter {letter} occurs {count} time{'s' * (count != 1)}"


def spelling(rng: random.Random) -> str:
    word = rng.choice(WORLD["words"]).lower()
    letter = rng.choice(word)
    if rng.random() < 0.3:
        return f"The word {word} is spelled {', '.join(word)}. {occurrences(letter, word)} in it."
    # Double quotes, since the tokenizer splits 's from the rest of 'strawberry'
    return f'How many {letter} are in {word}? "{word}".count("{letter}") is {word.count(letter)}.'


def exercises(rng: random.Random, length: int) -> str:
    """Tables, equations, counting, sorting and spelling, mixed or of one sort."""
    sorts = [table, solution, solution, counting, sorting, spelling, spelling, spelling]
    chosen = [rng.choice(sorts)] if rng.random() < 0.5 else sorts
    return fill(forever(lambda: rng.choice(chosen)(rng)), length, "\n")


def poems(rng: random.Random, length: int) -> str:
    """Poems with titles."""
    chosen = rng.sample(list(WORLD["poems"].items()), 4)
    return fill((f"A poem about {topic}:\n{poem}" for topic, poem in chosen), length, "\n\n")


WRITERS = {page: 24, mixed_page: 24, exam: 20, entries: 8, dialogue: 10, story: 8, exercises: 10, poems: 2}  # shares of documents

# -----------------------------------------------------------------------------
# Prose of the standard library


def prose_sources() -> Iterator[Path]:
    """The source files of these modules that this Python has, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in PROSE_MODULES:
        single = library / f"{name}.py"
        files = [single] if single.is_file() else sorted((library / name).rglob("*.py"))
        yield from (file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring that are prose: no code, tables or headings."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        words = " ".join(block.replace("``", "").replace("*", "").split())
        letters = sum(map(str.isalpha, words)) + words.count(" ")
        if len(words) < 40 or ">>>" in words or words[-1] not in ".:!?)":
            continue
        if words[0].isupper() and letters > 0.83 * len(words):
            yield words


def prose(seed: int) -> list[str]:
    """Documents of standard-library prose: long string constants of one module's source, joined, unrepeated."""
    rng = random.Random(f"prose {seed}")
    seen, found = set(), []
    for source in prose_sources():
        tree = ast.parse(source.read_text(encoding="utf-8", errors="replace"))
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        texts = (value for value in constants if isinstance(value, str) and len(value) >= 40)
        new = dict.fromkeys(words for text in texts for words in paragraphs(text) if words not in seen)
        seen |= new.keys()
        remaining = iter(new)
        while document := fill(remaining, int(rng.triangular(*DOCUMENT_LENGTHS)), "\n\n"):
            if len(document) >= DOCUMENT_LENGTHS[0]:
                found.append(document)
    rng.shuffle(found)
    return found


# -----------------------------------------------------------------------------
# The corpus


def documents(seed: int = 42, size: int = CORPUS_SIZE) -> list[str]:
    """About `size` characters of documents, shuffled. The same seed and Python version give the same text."""
    rng = random.Random(f"documents {seed}")
    chosen, total = [], 0
    for document in prose(seed):
        if total >= PROSE_SHARE * size:
            break
        chosen.append(document)
        total += len(document)
    writers, shares = list(WRITERS), list(WRITERS.values())
    while total < size:
        write = rng.choices(writers, shares)[0]
        document = write(rng, int(rng.triangular(*DOCUMENT_LENGTHS)))
        chosen.append(document)
        total += len(document)
    rng.shuffle(chosen)
    return chosen


def write_shards(directory: str | Path, seed: int = 42, size: int = CORPUS_SIZE) -> list[Path]:
    """Write the corpus as `shard_00000.parquet` ... and return the paths; the caller publishes the folder as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path(directory).mkdir(parents=True, exist_ok=True)
    corpus = documents(seed, size)
    paths = [Path(directory, f"shard_{index:05d}.parquet") for index in range(NUM_SHARDS)]
    for index, path in enumerate(paths):
        share = corpus[len(corpus) * index // NUM_SHARDS : len(corpus) * (index + 1) // NUM_SHARDS]
        pq.write_table(pa.table({"text": share}), path, row_group_size=ROW_GROUP_SIZE)
    return paths


# -----------------------------------------------------------------------------
# The quiz


class Question(NamedTuple):
    """A question about one fact, with a full-sentence reply and the bare answer."""

    kind: str
    text: str
    reply: str
    answer: str


def ask(rng: random.Random, kind: Kind, fact: Fact, templates: list[str]) -> Question:
    """A question about this fact in one of these phrasings, with one of the two replies of its kind."""
    text, reply = (sentence(rng.choice(choices), fact) for choices in (templates, kind.statements[:2]))
    return Question(kind.name, text, reply, fact[kind.answer])


def quiz(kinds: list[Kind] = KINDS, size: int = QUIZ_SIZE) -> list[Question]:
    """`size` questions in held-out phrasings, which take the kinds in turn.

    No fact is asked whose answer is part of the question, so that repeating the question is never right.
    """
    rng = random.Random("questions 42")
    pools = []
    for kind in kinds:
        pool = [ask(rng, kind, fact, [template]) for fact in kind.facts for template in kind.held_out]
        rng.shuffle(pool)
        pools.append([question for question in pool if question.answer not in question.text])
    rounds = (pool[turn] for turn in range(max(map(len, pools))) for pool in pools if turn < len(pool))
    return [question for question, _ in zip(rounds, range(size))]
