"""SampleWorld: conversations about the built-in corpus, and a quiz of 200 questions on it.

Split "train" has conversations in training phrasings, with greetings, thanks and a few words about the model;
"questions" has single questions in these phrasings, for reinforcement learning; "test" is the quiz, whose phrasings
occur in no training text. A reply is right if it contains the answer and no other answer of that kind.
"""

import random
import re
from collections.abc import Sequence

from nanochat.calculator import use_calculator
from nanochat.sample_world import KIND, QUIZ_SIZE, TABLES, WORLD, ask, occurrences, pick_kind, quiz, sentence
from tasks.common import Task, single_turn
from tasks.spellingbee import LETTERS, QUESTIONS

# The kinds that are calculated: with numbers, and with days and months
ARITHMETIC = ("sum", "difference", "product", "equation", "two days", "tomorrow", "yesterday", "month after", "month before")
SMALL_TALK = WORLD["small_talk"]
COUNT_QUESTIONS = QUESTIONS[:40]  # those in English

Exchange = tuple[str, str | list[dict]]  # (user, assistant)


def small_talk(rng: random.Random, topic: str) -> Exchange:
    return rng.choice(SMALL_TALK[topic]["said"]), rng.choice(SMALL_TALK[topic]["replies"])


def fact_exchanges(rng: random.Random) -> list[Exchange]:
    """A question about a fact as people type it, and sometimes one or two that refer to it ("And ...?")."""
    kind = pick_kind(rng)
    question = ask(rng, kind, rng.choice(kind.facts), kind.questions)
    text, manner = question.text, rng.random()
    if manner < 0.15:
        text = rng.choice(WORLD["openers"]) + text
    elif manner < 0.25:
        text = text.rstrip("?.")
    elif manner < 0.30:
        text = text.lower() if kind.name != "element" else text  # symbols need their capitals
    elif manner < 0.40:
        text = re.sub("^What is (the )?", "", text)
    exchanges = [(text, question.reply)]
    while rng.random() < 0.2 and len(exchanges) < 3:
        follow_up = ask(rng, kind, rng.choice(kind.facts), [kind.follow_up])
        exchanges.append((follow_up.text, follow_up.reply))
    return exchanges


def tool_call(expression: str, text: str) -> list[dict]:
    """A reply that evaluates the expression with the calculator and continues with `text`, in which {} is the result."""
    result = str(use_calculator(expression))
    parts = (("python", expression), ("python_output", result), ("text", text.format(result)))
    return [{"type": kind, "text": content} for kind, content in parts]


def tool_exchange(rng: random.Random) -> Exchange:
    """Letters of a word, or numbers too large to be known by heart."""
    if rng.random() < 0.6:
        word = rng.choice(WORLD["words"])
        letter = rng.choice(word if rng.random() < 0.8 else LETTERS).lower()
        shown = word if rng.random() < 0.8 else f'"{word}"'
        reply = tool_call(f'"{word.lower()}".count("{letter}")', f"{occurrences(letter, word.lower())}.")
        return rng.choice(COUNT_QUESTIONS).format(c=letter, w=shown), reply
    kind, sign = rng.choice([("sum", "+"), ("difference", "-"), ("product", "*")])
    lowest = 19 if kind == "difference" else 11  # smaller numbers are those of facts
    a, b = rng.randint(lowest, rng.choice([99, 999])), rng.randint(2, 99)
    question = sentence(rng.choice(KIND[kind].questions), {"a": str(a), "b": str(b)})
    if rng.random() < 0.3:  # 12*12
        question = rng.choice(["{}", "{}=", "{}?", "{} = ?", "What is {}?", "what is {}", "How much is {}?"]).format(f"{a}{sign}{b}")
    return question, tool_call(f"{a}{sign}{b}", f"{a} {sign} {b} = {{}}.")


def free_exchange(rng: random.Random) -> Exchange:
    """What first visitors type that is no question about a fact: a poem, a joke, or something unknown."""
    choice = rng.random()
    if choice < 0.25:
        topic, poem = rng.choice(list(WORLD["poems"].items()))
        return rng.choice(WORLD["poem_requests"]).format(topic=topic), poem
    if choice < 0.5:
        topic = rng.choice(list(WORLD["general"].values()))
        return rng.choice(topic["said"]), rng.choice(topic["replies"])
    country = rng.choice(KIND["capital"].facts)
    slots = country | {"name": rng.choice(TABLES["names"]), "thing": rng.choice(TABLES["things"])}
    return rng.choice(WORLD["unknown"]["said"]).format(**slots), rng.choice(WORLD["unknown"]["replies"])


def conversation(exchanges: list[Exchange]) -> dict:
    return {"messages": [message for exchange in exchanges for message in single_turn(*exchange)["messages"]]}


def training_conversation(rng: random.Random) -> dict:
    """Small talk, one question, or a chat of several turns that begins and ends as chats do."""
    shape = rng.random()
    if shape < 0.12:
        return conversation([small_talk(rng, rng.choice(list(SMALL_TALK)))])
    if shape < 0.28:
        return conversation([tool_exchange(rng)])
    if shape < 0.37:
        return conversation([free_exchange(rng)])
    if shape < 0.65:
        return conversation(fact_exchanges(rng))
    exchanges = [small_talk(rng, "greeting")] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.25:
            exchanges.append(small_talk(rng, rng.choice(["wellbeing", "identity", "maker", "ability", "praise"])))
        if rng.random() < 0.3:
            exchanges.append(rng.choice([tool_exchange, free_exchange])(rng))
        exchanges += fact_exchanges(rng)
    if rng.random() < 0.5:
        exchanges.append(small_talk(rng, "thanks"))
    if rng.random() < 0.4:
        exchanges.append(small_talk(rng, "farewell"))
    return conversation(exchanges)


def words(text: str, keep_case: bool = False) -> str:
    """The words of a text between single spaces: `"Mercury, Venus and Mars."` -> `" mercury venus mars "`.

    "and" is dropped, so that lists may be joined either way.
    """
    found = re.findall(r"\w+", text if keep_case else text.lower())
    return " " + " ".join(word for word in found if word.lower() != "and") + " "


def is_right(kind_name: str, question: str, answer: str, reply: str) -> bool:
    """Whether `reply` contains the answer, as whole words, and no other answer of its kind.

    What the question itself mentions may be repeated. Case counts for chemical symbols only.
    """
    keep_case = kind_name == "symbol"
    question, answer, reply = (words(text, keep_case) for text in (question, answer, reply))
    if answer not in reply:
        return False
    if answer.strip().isdigit():
        others = {f" {number} " for number in re.findall(r"\d+", reply)}
    else:
        others = {words(fact[KIND[kind_name].answer], keep_case) for fact in KIND[kind_name].facts}
    return not any(other in reply and other not in question and other not in answer for other in others)


class SampleWorld(Task):
    """`size` examples of a split; those of "questions" and "test" are about these `kinds` of fact."""

    eval_type = "generative"
    examples = ("Who are you?", "What is the capital of France?", "How many r are in strawberry?", "Why is the sky blue?")

    def __init__(self, split: str, size: int | None = None, kinds: Sequence[str] = tuple(KIND), **view):
        assert split in ("train", "questions", "test"), split
        super().__init__(**view)
        self.split, self.kinds = split, [KIND[name] for name in kinds]
        self.rows = quiz(self.kinds, size or QUIZ_SIZE) if split == "test" else range(size or 4000)

    def get_example(self, index: int) -> dict:
        rng = random.Random(f"SampleWorld {index}")
        if self.split == "train":
            return training_conversation(rng)
        if self.split == "test":
            question = self.rows[index]
        else:
            kind = rng.choice(self.kinds)
            question = ask(rng, kind, rng.choice(kind.facts), kind.questions)
        return single_turn(question.text, question.reply, kind=question.kind, answer=question.answer)

    def evaluate(self, conversation: dict, completion: str) -> bool:
        question = conversation["messages"][0]["content"]
        return is_right(conversation["kind"], question, conversation["answer"], completion)
