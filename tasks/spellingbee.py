"""How many r are in strawberry? Two tasks that teach a model to look inside its tokens.

A model sees tokens, not letters, so it must first learn how words are spelled (`SimpleSpelling`)
and then to count carefully: spell the word, go through it letter by letter, and check the result
with the calculator (`SpellingBee`). Everything about an example follows from its split and index.

Words come from https://github.com/dwyl/english-words; every tenth is kept for testing, so no
word of a test is ever trained on.
"""

from __future__ import annotations

import random

from nanochat.common import file_url, get_base_dir
from nanochat.dataset import fetch_file
from tasks.common import NumberTask, Task, single_turn

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# {c} is the letter, {w} the word. People ask in all manner of wordings and languages.
QUESTIONS = """
How many times does the letter {c} occur in {w}?
How many times does {c} appear in {w}?
How many times does the letter {c} show up in the word {w}?
How many times is {c} used in {w}?
How many times do you find {c} in {w}?
How many times can you see the letter {c} in {w}?
How often does {c} occur in the word {w}?
How often is the letter {c} in {w}?
How many {c} are in {w}?
How many {c} are there in the word {w}?
How many {c}s are in {w}?
How many {c}'s does {w} have?
How many {c}'s are there in {w}?
How many letters {c} are in {w}?
How many letter {c} does the word {w} contain?
How many {c} letters does {w} have?
How many of the letters in {w} are {c}?
What is the number of {c} in {w}?
What's the count of the letter {c} in {w}?
What is the total number of times {c} occurs in {w}?
Count the {c} in {w}.
Count the number of {c} in the word {w}
Count how many times {c} appears in {w}.
Please count the letter {c} in {w}.
Tell me how many {c} are in {w}.
Can you count the {c}'s in {w}?
Can you tell me how many times {c} is in {w}?
Could you count the letter {c} in the word {w} for me?
Do you know how many {c} there are in {w}?
I want to know how many {c} are in {w}.
I wonder how often {c} is in the word {w}
In the word {w}, how many times does {c} occur?
In {w}, how many {c} are there?
Look at the word {w}. How many {c} does it have?
The word is {w}. The letter is {c}. How many?
If you spell {w}, how many times do you write {c}?
Number of {c} in {w}?
{w}: how many {c}?
Count of {c} in {w} =
Does {w} contain {c}, and how many times?
¿Cuántas veces aparece la letra {c} en {w}?
¿Cuántas {c} hay en la palabra {w}?
Combien de fois la lettre {c} apparaît-elle dans {w} ?
Combien de {c} y a-t-il dans le mot {w} ?
Wie oft kommt der Buchstabe {c} in {w} vor?
Wie viele {c} hat das Wort {w}?
Quante volte compare la lettera {c} in {w}?
Quante {c} ci sono nella parola {w}?
Quantas vezes a letra {c} aparece em {w}?
Quantas letras {c} tem a palavra {w}?
Hoe vaak komt de letter {c} voor in {w}?
Сколько раз буква {c} встречается в слове {w}?
{w} 中有多少个 {c}？
{w} 这个词里字母 {c} 出现了几次？
{w} に {c} は何回出てきますか？
{w} 에 {c} 가 몇 번 나오나요?
""".strip().split("\n")


def load_words(split: str) -> list[str]:
    """The words of a split, in alphabetical order; fetched once. UserError where the list is out of reach."""
    assert split in ("train", "test"), split
    path = fetch_file(file_url(WORDS_URL), get_base_dir() / "words_alpha.txt", max_bytes=2**26)
    words = path.read_text(encoding="ascii").split()
    return words[9::10] if split == "test" else [word for index, word in enumerate(words) if index % 10 != 9]


def spell(word: str) -> str:
    """`"apple"` -> `"apple:a,p,p,l,e"`."""
    return f"{word}:{','.join(word)}"


class SimpleSpelling(Task):
    """Spell the word: apple. -> apple:a,p,p,l,e"""

    def __init__(self, size: int = 1000, split: str = "train", **view):
        super().__init__(**view)
        self.rows, self.split, self.words = range(size), split, load_words(split)

    def get_example(self, index: int) -> dict:
        word = random.Random(f"spelling {self.split} {index}").choice(self.words)
        return single_turn(f"Spell the word: {word}", spell(word))


class SpellingBee(NumberTask):
    """How many times does a letter occur in a word?"""

    examples = ("How many r are in strawberry?",)

    def __init__(self, size: int = 1000, split: str = "train", **view):
        super().__init__(**view)
        self.rows, self.split, self.words = range(size), split, load_words(split)

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
    letter_quote, word_quote = rng.choice(("", "'", '"', "`")), rng.choice(("", "'", '"', "`"))
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
