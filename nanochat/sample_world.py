"""The built-in corpus: a small textbook world, written by a seeded generator, and the quiz on it.

One idea: every document is drawn from the same thousand facts, said in many ways, so that a small model
which reads only a part of the corpus still meets each fact dozens of times, and what it learned can be
asked. Facts stand in `sample_facts`, phrasings in `sample_phrases`; here they become pages, exams,
stories, dialogues and exercises. One part in twenty-five is prose of Python's own standard library, read
from its source files, for natural variety.

Everything follows from the seed and the Python version (whose prose it quotes). Nothing is imported from
the modules that are quoted, and nothing here knows of tokens or models.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from nanochat.sample_facts import ANIMALS, COLOURS, DAYS, EQUATIONS, FOODS, MONTHS, NAMES, PLACES, PLURALS, THINGS
from nanochat.sample_phrases import ENTRIES, KINDS, Kind

CORPUS_SIZE = 30_000_000  # characters
NUM_SHARDS = 8  # the last one is the validation split
ROW_GROUP_SIZE = 1024  # documents
DOCUMENT_LENGTHS = (300, 3000, 900)  # characters: least, most, mode
PROSE_SHARE = 0.04  # of the characters: all that the standard library has to say, said once
QUIZ_SIZE = 200

KIND_WEIGHTS = [len(kind.facts) + 15 for kind in KINDS]  # nearly equal attention to each fact
KIND = {kind.name: kind for kind in KINDS}


def sentence(template: str, slots: dict[str, str]) -> str:
    """`"{animal} {sound}."` with a dog's slots -> `"A dog barks."`"""
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def pick_kind(rng: random.Random) -> Kind:
    return rng.choices(KINDS, KIND_WEIGHTS)[0]


def tell(rng: random.Random, kind: Kind) -> str:
    """A fact of this kind as a statement. The canonical phrasing comes at least twice as often as any other."""
    templates = kind.statements
    template = templates[0] if rng.random() < 0.3 else rng.choice(templates)
    return sentence(template, rng.choice(kind.facts))


def fill(pieces: Iterator[str], length: int, separator: str = " ") -> str:
    """Join pieces until `length` characters are reached (or the pieces end)."""
    taken, total = [], 0
    for piece in pieces:
        taken.append(piece)
        total += len(piece) + len(separator)
        if total >= length:
            break
    return separator.join(taken)


def forever(piece: Callable[[], str]) -> Iterator[str]:
    while True:
        yield piece()


# -----------------------------------------------------------------------------
# Documents of facts. Each writer takes a generator of random numbers and a length in characters.


def page(rng: random.Random, length: int) -> str:
    """A page about one kind of fact."""
    kind = pick_kind(rng)
    return fill(forever(lambda: tell(rng, kind)), length)


def mixed_page(rng: random.Random, length: int) -> str:
    """Paragraphs in which anything may follow anything."""

    def paragraph() -> str:
        return fill(forever(lambda: tell(rng, pick_kind(rng))), rng.randint(150, 500))

    return fill(forever(paragraph), length, "\n\n")


def entries(rng: random.Random, length: int) -> str:
    """An encyclopedia: all that is known about one country, element or animal after the other."""
    kinds = [KIND[name] for name in rng.choice(ENTRIES)]

    def entry() -> str:
        fact = rng.choice(kinds[0].facts)
        return " ".join(sentence(rng.choice(kind.statements), fact) for kind in kinds)

    return fill(forever(entry), length, "\n")


def exam(rng: random.Random, length: int) -> str:
    """Questions with answers, on one kind of fact or on all."""
    asked = rng.choice([("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")])
    one_kind = pick_kind(rng) if rng.random() < 0.4 else None

    def exchange() -> str:
        kind = one_kind or pick_kind(rng)
        fact = rng.choice(kind.facts)
        question = sentence(rng.choice(kind.questions), fact)
        return f"{asked[0]}{question}\n{asked[1]}{sentence(rng.choice(kind.statements[:2]), fact)}"

    return fill(forever(exchange), length, "\n\n" if rng.random() < 0.5 else "\n")


THANKS = ["Thank you, {b}.", "Thanks, {b}!", "That is right.", "Good, I did not know that.", "I will remember that."]
GOODBYES = ["Goodbye, {b}! See you on {day}.", "It is late. Good night, {b}.", "Thank you for your help, {b}. Goodbye!"]
GREETINGS = ["Hello, {b}! How are you?", "Good morning, {b}.", "Hi, {b}! May I ask you something?"]


def dialogue(rng: random.Random, length: int) -> str:
    """Two children ask each other what they know."""
    a, b = rng.sample(NAMES, 2)

    def lines() -> Iterator[str]:
        yield f"{a}: {rng.choice(GREETINGS).format(b=b)}"
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
                yield f"{a}: {rng.choice(THANKS).format(b=b)}"

    goodbye = f"{a}: {rng.choice(GOODBYES).format(b=b, day=rng.choice(DAYS))}"
    return fill(lines(), length, "\n") + "\n" + goodbye


# -----------------------------------------------------------------------------
# Stories

OPENINGS = [
    "On {day} morning {hero} went to {place}.", "One day in {month}, {hero} and {friend} walked to {place}.",
    "{hero} had a {colour} {thing}.", "It was {day}, and {hero} was on the way to {place}.",
    "{hero} and {friend} were friends.", "Once there was a {animal} that lived near {place}.",
]
EVENTS = [
    "{hero} saw a {animal} there.", "The {animal} was very hungry.", "{friend} gave the {animal} some {food}.",
    "They sat down and ate {food} together.", "Then {friend} lost the {colour} {thing}.",
    "{hero} looked for the {thing} near {place}.", "The {animal} found the {colour} {thing}.",
    "{friend} laughed, and {hero} laughed too.", "It began to rain, so they ran to {place}.",
    "In the afternoon {friend} came with a {colour} {thing}.", "The {animal} followed them to {place}.",
    "{hero} told {friend} about the {animal}.", "They counted {number} birds in the sky.",
    "A man was selling {food}, and {hero} bought some for {number} pence.",
]
LESSONS = [
    "{friend} asked a question. {question} {hero} knew it: {fact}",
    "Then {hero} remembered something from school: {fact}",
    "On the wall of the school they read: {fact}", "Their teacher had said it many times: {fact}",
    "{question} That was easy for {hero}: {fact}",
]
ENDINGS = [
    "In the evening they went home and slept well.", "{hero} was happy, and so was the {animal}.",
    "From that day on {hero} and {friend} met every {day}.", "It had been a good day.",
]


def story(rng: random.Random, length: int) -> str:
    """Two friends, an animal and a thing; what they learn on the way is true in this world."""
    hero, friend = rng.sample(NAMES, 2)
    slots = {"hero": hero, "friend": friend, "day": rng.choice(DAYS), "month": rng.choice(MONTHS)}
    slots |= {"place": rng.choice(PLACES), "thing": rng.choice(THINGS), "food": rng.choice(FOODS)}
    slots |= {"colour": rng.choice(list(COLOURS)), "animal": rng.choice(list(ANIMALS))}
    slots |= {"number": str(rng.randint(2, 9))}

    def sentences() -> Iterator[str]:
        yield rng.choice(OPENINGS).format(**slots)
        while True:
            for event in rng.sample(EVENTS, 2):
                yield event.format(**slots)
            kind = pick_kind(rng)
            fact = rng.choice(kind.facts)
            question = sentence(rng.choice(kind.questions), fact)
            yield rng.choice(LESSONS).format(question=question, fact=sentence(kind.statements[0], fact), **slots)

    return fill(sentences(), min(length, 1500)) + " " + rng.choice(ENDINGS).format(**slots)


# -----------------------------------------------------------------------------
# Exercises: tables, equations step by step, counting, sorting


def table(rng: random.Random) -> str:
    n, operator = rng.randint(1, 9), rng.choice("+-*")
    rows = {
        "+": (f"{n} + {i} = {n + i}" for i in range(1, 10)),
        "-": (f"{n + i} - {n} = {i}" for i in range(1, 10)),
        "*": (f"{n} * {i} = {n * i}" for i in range(1, 10)),
    }
    return ", ".join(rows[operator]) + "."


def solution(rng: random.Random) -> str:
    """An equation solved step by step, ending in its canonical sentence."""
    slots = rng.choice(EQUATIONS)
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
    words = rng.sample(list(PLURALS), rng.randint(3, 4))
    return f"In the order of the alphabet, {', '.join(words)} become {', '.join(sorted(words))}."


def exercises(rng: random.Random, length: int) -> str:
    """Sums, equations, counting and sorting, mixed or of one sort."""
    sorts = [table, solution, solution, counting, sorting]
    chosen = [rng.choice(sorts)] if rng.random() < 0.5 else sorts
    return fill(forever(lambda: rng.choice(chosen)(rng)), length, "\n")


WRITERS = {page: 24, mixed_page: 24, exam: 20, entries: 8, dialogue: 10, story: 8, exercises: 6}  # shares of documents

# -----------------------------------------------------------------------------
# Prose of the standard library

PROSE_MODULES = """
    _pydecimal _pyio abc argparse ast asyncio base64 bdb bisect bz2 calendar cmd code codecs collections colorsys
    compileall concurrent configparser contextlib copy copyreg csv ctypes curses dataclasses datetime dbm difflib dis
    doctest email encodings enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext glob
    graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache locale
    logging lzma mailbox mimetypes modulefinder multiprocessing netrc numbers opcode operator optparse os pathlib pdb
    pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pyclbr pydoc pydoc_data queue
    quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil site smtplib socket
    socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable tabnanny tarfile tempfile
    textwrap threading timeit tkinter token tokenize trace traceback tracemalloc turtle types typing unittest urllib
    uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
""".split()


def prose_sources() -> Iterator[Path]:
    """The source files of those modules that this Python has as source, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in PROSE_MODULES:
        single = library / f"{name}.py"
        files = [single] if single.is_file() else sorted((library / name).rglob("*.py"))
        yield from (file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a documentation string that read as prose: no code, no tables, no headings."""
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
        fresh = [words for text in texts for words in paragraphs(text) if not (words in seen or seen.add(words))]
        remaining = iter(fresh)
        while document := fill(remaining, int(rng.triangular(*DOCUMENT_LENGTHS)), "\n\n"):
            if len(document) >= DOCUMENT_LENGTHS[0]:
                found.append(document)
    rng.shuffle(found)
    return found


# -----------------------------------------------------------------------------
# The corpus


def documents(seed: int = 42, size: int = CORPUS_SIZE) -> Iterator[str]:
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
    yield from chosen


def write_shards(directory: str | os.PathLike, seed: int = 42, size: int = CORPUS_SIZE) -> list[Path]:
    """Write the corpus as `shard_00000.parquet` ... and return the paths; the last one is the validation split.

    Each file has one `text` column in row groups of 1024 documents. The files appear under their names
    only after all of them are written, so a folder never holds a part of the corpus.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    corpus = list(documents(seed, size))
    paths = [directory / f"shard_{index:05d}.parquet" for index in range(NUM_SHARDS)]
    for index, path in enumerate(paths):
        share = corpus[len(corpus) * index // NUM_SHARDS : len(corpus) * (index + 1) // NUM_SHARDS]
        pq.write_table(pa.table({"text": share}), path.with_suffix(".tmp"), row_group_size=ROW_GROUP_SIZE)
    for path in paths:
        os.replace(path.with_suffix(".tmp"), path)
    return paths


# -----------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question:
    """A question about one fact, with a full-sentence reply and the bare answer."""

    kind: str
    text: str
    reply: str
    answer: str


def ask(rng: random.Random, kind: Kind, fact: dict[str, str], templates: Iterable[str]) -> Question:
    """This fact asked in one of these phrasings, with one of the two replies of its kind."""
    text, reply = (sentence(rng.choice(list(choices)), fact) for choices in (templates, kind.statements[:2]))
    return Question(kind.name, text, reply, fact[kind.answer])


def questions(split: str, seed: int = 42, kinds: list[Kind] = KINDS, size: int = QUIZ_SIZE) -> list[Question]:
    """`"train"`: every fact in every training phrasing. `"test"`: a quiz of `size` questions in held-out phrasings.

    The quiz takes the kinds in turn and asks no fact whose answer already stands in the question,
    so that repeating the question is never right.
    """
    rng = random.Random(f"questions {seed}")
    if split == "train":
        return [ask(rng, kind, fact, [t]) for kind in kinds for fact in kind.facts for t in kind.questions]
    assert split == "test", split
    pools = []
    for kind in kinds:
        pool = [ask(rng, kind, fact, [template]) for fact in kind.facts for template in kind.held_out]
        rng.shuffle(pool)
        pools.append([question for question in pool if question.answer not in question.text])
    rounds = (pool[turn] for turn in range(max(map(len, pools))) for pool in pools if turn < len(pool))
    return [question for question, _ in zip(rounds, range(size))]
