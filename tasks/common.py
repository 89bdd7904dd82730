"""What a task is: conversations to learn from, and a way to judge an answer.

A task is a sequence: `len(task)`, `task[i]`. Each item is a conversation that ends with the right
answer, `{"messages": [{"role", "content"}, ...]}`; training reads all of it, evaluation shows the
model everything before the last message and hands what it says to `evaluate`. An assistant's
content is a string or parts `{"type": "text" | "python" | "python_output", "text"}` (see
nanochat/conversation.py). Nothing here knows of tokens or models.
"""

from __future__ import annotations

import http.client
import random
import re
import ssl
import urllib.error
import urllib.request
from decimal import Decimal
from typing import Callable, Sequence

from nanochat.common import Compute, UserError, hub_endpoint, print0
from nanochat.conversation import checked_turns


class Task:
    """A view `[start:stop:step]` of a data set, as conversations.

    A subclass gives `num_examples`, `get_example` and, where answers can be checked, `evaluate`.
    """

    eval_type: str | None = None  # "categorical": choose a letter; "generative": say it; None: to train on only
    baseline = 0.0  # the accuracy of guessing

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self.view = slice(start, stop, step)

    def num_examples(self) -> int:
        """The number of examples behind the view."""
        raise NotImplementedError

    def get_example(self, index: int) -> dict:
        """Example `index` of the whole data set, whatever the view."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether `completion`, said in place of the conversation's last message, is right."""
        raise NotImplementedError

    def reward(self, conversation: dict, completion: str) -> float:
        """How good `completion` is, for reinforcement learning: 1.0 where it is right, else 0.0."""
        return float(self.evaluate(conversation, completion))

    def __len__(self) -> int:
        return len(range(self.num_examples())[self.view])

    def __getitem__(self, index: int) -> dict:
        """The conversation at `index` of the view; IndexError past its end, which is what ends a `for`."""
        return self.get_example(range(self.num_examples())[self.view][index])


class CategoricalTask(Task):
    """Multiple choice. Its conversations carry `letters`, those that may be answered."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: dict, completion: str) -> bool:
        letters = conversation["letters"]
        assert completion in letters, f"{completion!r} is none of the letters {letters}"
        return completion == conversation["messages"][-1]["content"]

    def reward(self, conversation: dict, completion: str) -> float:
        """1.0 for the right letter and nothing else. What is said freely need not be a letter at all."""
        return float(completion.strip() == conversation["messages"][-1]["content"])


class TaskMixture(Task):
    """Several tasks shuffled into one, the same way every time. Name a task twice to see it twice as often."""

    def __init__(self, tasks: Sequence[Task], seed: int = 42, **view):
        super().__init__(**view)
        self.tasks = list(tasks)
        self.order = [(which, index) for which, task in enumerate(self.tasks) for index in range(len(task))]
        random.Random(seed).shuffle(self.order)

    def num_examples(self) -> int:
        return len(self.order)

    def get_example(self, index: int) -> dict:
        which, inner = self.order[index]
        return self.tasks[which][inner]


class TaskSequence(Task):
    """Several tasks one after the other: a curriculum."""

    def __init__(self, tasks: Sequence[Task], **view):
        super().__init__(**view)
        self.tasks = list(tasks)

    def num_examples(self) -> int:
        return sum(len(task) for task in self.tasks)

    def get_example(self, index: int) -> dict:
        for task in self.tasks:
            if index < len(task):
                return task[index]
            index -= len(task)
        raise IndexError(index)


# -----------------------------------------------------------------------------
# Data sets of the hub


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether anything answers at the hub's address, be it with an error."""
    try:
        request = urllib.request.Request(hub_endpoint(), method="HEAD", headers={"User-Agent": "nanochat"})
        urllib.request.urlopen(request, timeout=timeout).close()
        return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        # a certificate that Python does not know: it is there, and `datasets` brings its own
        return isinstance(getattr(error, "reason", None), ssl.SSLError)


def load_hub_dataset(name: str, subset: str | None, split: str):
    """A data set of the hub, shuffled with seed 42. One that was fetched before needs no connection.

    Raises:
        UserError: names the data set, the address and the cause.
    """
    import datasets
    import huggingface_hub.constants

    # Sent online in vain, the library retries for half a minute per data set, so it is told not to try.
    switches = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in switches]
    reachable = hub_answers()
    try:
        for module in switches:
            module.HF_HUB_OFFLINE |= not reachable
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library's own, its HTTP client's and the system's have no common ancestor
        while error.__cause__ is not None:
            error = error.__cause__
        cause = str(error).split("\n")[0].rstrip(".") if reachable else "nothing answers there"
        raise UserError(
            f"cannot load the data set {name} ({subset or 'default'}, {split}) from {hub_endpoint()}: {cause}. "
            "Check the connection or set HF_ENDPOINT to a mirror, then run this again."
        ) from error
    finally:
        for module, value in zip(switches, before):
            module.HF_HUB_OFFLINE = value
    return rows.shuffle(seed=42)


# -----------------------------------------------------------------------------
# Shared by several tasks


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as the text that the user asks.

    Each letter follows its choice, so that a small model binds the two by looking back from the
    letter to the text before it. It stands behind " (", which the tokenizer never merges with a
    letter, so it is the very token that is the answer.

    >>> print(render_mc("What is frozen water?", ["A", "B"], ["Ice", "Steam"]))
    Multiple choice question: What is frozen water?
    - Ice (A)
    - Steam (B)
    <BLANKLINE>
    Respond only with the letter of the correct answer.
    """
    assert len(letters) == len(choices), f"{len(letters)} letters for {len(choices)} choices"
    lines = "\n".join(f"- {choice} ({letter})" for letter, choice in zip(letters, choices))
    return f"Multiple choice question: {question}\n{lines}\n\nRespond only with the letter of the correct answer."


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, without commas and dollar sign; None where there is none.

    >>> final_number("so it costs\\n#### $1,250.50")
    Decimal('1250.50')
    """
    match = re.search(r"####\s*\$?(-?)\$?([0-9][0-9,]*\.?[0-9]*|\.[0-9]+)", text)
    return Decimal(match[1] + match[2].replace(",", "")) if match else None


def same_final_number(conversation: dict, completion: str) -> bool:
    """Whether `completion` ends in the number that the conversation's last message, in parts, ends in."""
    right = final_number(conversation["messages"][-1]["content"][-1]["text"])
    assert right is not None, "the conversation's own answer has a number after ####"
    return final_number(completion) == right


def check_conversation(conversation: dict) -> dict:
    """The conversation itself, unless it is malformed or nobody answers in it: then UserError says where."""
    if len(checked_turns(conversation)) < 2:
        raise UserError("messages[0] is all there is; an assistant message must follow")
    return conversation


def available_tasks(makers: dict[str, Callable[[], Task]], wanted: str, compute: Compute) -> dict[str, Task]:
    """The tasks named in `wanted` ("SmolTalk,GSM8K"), in that order; one whose data is out of reach is skipped and said so.

    The main rank fetches; all ranks get the same tasks. Raises UserError for a name that `makers` does not have, and
    where no task is left.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in makers]
    if unknown or not names:
        raise UserError(f"{', '.join(unknown) or 'no task'} is not among the tasks here: {', '.join(makers)}")
    tasks = {}
    for name in names:
        try:
            tasks[name] = compute.main_first(makers[name])
        except UserError as error:
            print0(f"{name} is skipped: {error}")
    if not tasks:
        raise UserError(f"none of {', '.join(names)} can be loaded; without a connection use --tasks=SampleWorld")
    return tasks
