"""How many r are in strawberry? Two tasks that teach a model to look inside its tokens.

A model sees tokens, not letters, so it must first learn how words are spelled (`SimpleSpelling`)
and then to count carefully: spell the word, go through it letter by letter, and check the result
with the calculator (`SpellingBee`). Everything about an example follows from its split and index.

Every tenth word of the list is kept for testing, so no word of a test is ever trained on.
"""

import random
from pathlib import Path

from nanochat.common import file_url, get_base_dir
from nanochat.dataset import fetch_file
from tasks.common import NumberTask, Task, single_turn

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# {c} is the letter, {w} the word; many wordings, the first 40 in English, then other languages
QUESTIONS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()


def read_words(path: Path) -> list[str]:
    """The words of a file, one per line. ValueError if it is no list of words."""
    words = path.read_text(encoding="ascii").split()
    if len(words) < 1000 or not all(word.isalpha() and word.islower() for word in words):  # there are 370,105
        raise ValueError("it is not a list of at least 1,000 lower-case words")
    return words


def load_words(split: str) -> list[str]:
    """The words of a split, in alphabetical order; fetched once. UserError where the list is out of reach or damaged."""
    assert split in ("train", "test"), split
    words = fetch_file(file_url(WORDS_URL), get_base_dir() / "words_alpha.txt", read_words, max_bytes=2**26)
    return words[9::10] if split == "test" else [word for index, word in enumerate(words) if index % 10 != 9]


def spell(word: str) -> str:
    """`"apple"` -> `"apple:a,p,p,l,e"`."""
    return f"{word}:{','.join(word)}"


class WordTask(Task):
    """`size` examples about random words of a split."""

    def __init__(self, size: int = 1000, split: str = "train", **view):
        super().__init__(**view)
        self.rows, self.split, self.words = range(size), split, load_words(split)


class SimpleSpelling(WordTask):
    """Spell the word: apple. -> apple:a,p,p,l,e"""

    def get_example(self, index: int) -> dict:
        word = random.Random(f"spelling {self.split} {index}").choice(self.words)
        return single_turn(f"Spell the word: {word}", spell(word))


class SpellingBee(WordTask, NumberTask):
    """How many times does a letter occur in a word?"""

    examples = ("How many r are in strawberry?",)

    def get_example(self, index: int) -> dict:
        rng = random.Random(f"counting {self.split} {index}")
        word = rng.choice(self.words)
        # mostly a letter of the word, which is the harder question, but "none" must be an answer too
        letter = rng.choice(word if rng.random() < 0.9 else LETTERS)
        return single_turn(ask(word, letter, rng), count_carefully(word, letter))


def ask(word: str, letter: str, rng: random.Random) -> str:
    """The question as someone might type it: some wording, some quotes, some capitals, now and then no end."""
    question = rng.choice(QUESTIONS)
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?.？ ")
    letter_quote, word_quote = (rng.choice(("", "'", '"', "`")) for _ in range(2))
    change_case = rng.choice((str, str, str, str, str.upper, str.capitalize))
    return question.format(
        c=f"{letter_quote}{rng.choice((str, str, str.upper))(letter)}{letter_quote}",
        w=f"{word_quote}{change_case(word)}{word_quote}",
    )


def count_carefully(word: str, letter: str) -> list[dict]:
    """The answer in parts: by hand with a running count, then with Python, then the number after ####."""
    count, lines = 0, []
    for position, character in enumerate(word, start=1):
        count += character == letter
        lines.append(f"{position} {character} {count}")
    by_hand = (
        f"First I spell the word.\n{spell(word)}\n\n"
        f"Then I go through it and keep count of '{letter}'.\n" + "\n".join(lines) + "\n\n"
        f"By hand I find {count}. Let me check with Python.\n"
    )
    times = "1 time" if count == 1 else f"{count} times"
    return [
        {"type": "text", "text": by_hand},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\nPython agrees: '{letter}' occurs {times} in '{word}'.\n\n#### {count}"},
    ]
