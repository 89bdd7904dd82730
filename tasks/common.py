"""What a task is: conversations for training, and a way to grade a completion.

A task is a sequence: `len(task)`, `task[i]`. Each item is a conversation that ends with the right answer,
`{"messages": [{"role", "content"}, ...]}`. Training uses all of it; evaluation prompts the model with everything before
the last message and passes its completion to `evaluate`. Assistant content is a string or parts
`{"type": "text" | "python" | "python_output", "text"}` (see nanochat/conversation.py).
"""

import random
import re
from decimal import Decimal
from functools import partial
from typing import Callable, Sequence

from nanochat.common import Compute, Unreachable, UserError, hub_endpoint, print0
from nanochat.conversation import checked_turns
from nanochat.dataset import hub_answers


class Task:
    """A view `[start:stop:step]` of a data set, as conversations.

    A subclass sets `rows`. It defines `get_example` if they are no conversations, and `evaluate` if it can grade completions.
    """

    eval_type: str | None = None  # "categorical": choose a letter; "generative": write an answer; None: training only
    baseline = 0.0  # the accuracy of guessing
    examples: tuple[str, ...] = ()  # what to ask a model that was trained on it, for the chat page
    rows: Sequence = ()  # what the examples are made from, one each

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self.view = slice(start, stop, step)

    def get_example(self, index: int) -> dict:
        """Example `index` of the whole data set, whatever the view."""
        return self.rows[index]

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether `completion`, in place of the conversation's last message, is right."""
        raise NotImplementedError

    def reward(self, conversation: dict, completion: str) -> float:
        """The reward of `completion` for reinforcement learning: 1.0 if it is right, else 0.0."""
        return float(self.evaluate(conversation, completion))

    def __len__(self) -> int:
        return len(range(len(self.rows))[self.view])

    def __getitem__(self, index: int) -> dict:
        """The conversation at `index` of the view; IndexError past its end. UserError if its row lacks something."""
        row = range(len(self.rows))[self.view][index]
        try:
            return self.get_example(row)
        except (LookupError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"row {row} of {type(self).__name__} is damaged ({error!r}); omit the task") from error


class CategoricalTask(Task):
    """Multiple choice. Its conversations hold `letters`, the possible answers."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


class NumberTask(Task):
    """The answer is in parts, the last of which ends in a number after "####"."""

    eval_type = "generative"

    def evaluate(self, conversation: dict, completion: str) -> bool:
        right = final_number(conversation["messages"][-1]["content"][-1]["text"])
        assert right is not None, "the conversation's own answer has a number after ####"
        return final_number(completion) == right


class TaskSequence(Task):
    """Several tasks one after the other. A task that is listed twice appears twice as often."""

    def __init__(self, tasks: Sequence[Task], **view):
        super().__init__(**view)
        self.rows = [(task, index) for task in tasks for index in range(len(task))]
        self.examples = tuple(dict.fromkeys(example for task in tasks for example in task.examples))[:4]

    def get_example(self, index: int) -> dict:
        task, inner = self.rows[index]
        return task[inner]


class TaskMixture(TaskSequence):
    """Several tasks shuffled into one, deterministically."""

    def __init__(self, tasks: Sequence[Task], seed: int = 42, **view):
        super().__init__(tasks, **view)
        random.Random(seed).shuffle(self.rows)


# -----------------------------------------------------------------------------
# What tasks are made from


def load_hub_dataset(name: str, subset: str | None, split: str):
    """A data set of the hub, shuffled with seed 42. One that was downloaded before needs no connection.

    Raises Unreachable, which names the data set, the address and the cause.
    """
    import datasets
    import huggingface_hub.constants

    # The library retries for half a minute per data set, so it is put offline if nothing answers
    config, constants = datasets.config, huggingface_hub.constants
    offline, reachable = config.HF_HUB_OFFLINE, hub_answers()
    try:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline or not reachable
        return datasets.load_dataset(name, subset, split=split).shuffle(seed=42)
    except Exception as error:  # of the library, its HTTP client or the system, without a common ancestor
        while error.__cause__ is not None:
            error = error.__cause__
        cause = str(error).split("\n")[0].rstrip(".") if reachable else "nothing answers there"
        raise Unreachable(
            f"cannot load the data set {name} ({subset or 'default'}, {split}) from {hub_endpoint()}: {cause}. "
            "Check the connection or set HF_ENDPOINT to a mirror, then run this again."
        ) from error
    finally:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline


def single_turn(question: str, answer: str | list[dict], /, **fields) -> dict:
    """A conversation of one question and its answer, with further `fields` that grading needs."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as a user message.

    Each letter follows its choice, so that a small model can bind the two by attending to the text before the letter.
    It follows " (", which the tokenizer never merges with a letter, so the letter is the same token as the answer.

    >>> print(render_mc("What is frozen water?", ["A", "B"], ["Ice", "Steam"]))
    Multiple choice question: What is frozen water?
    - Ice (A)
    - Steam (B)
    <BLANKLINE>
    Respond only with the letter of the correct answer.
    """
    assert len(letters) == len(choices), f"{len(letters)} letters for {len(choices)} choices"
    lines = "".join("- " + choice + " (" + letter + ")\n" for letter, choice in zip(letters, choices))  # None is a TypeError
    return "Multiple choice question: " + question + f"\n{lines}\nRespond only with the letter of the correct answer."


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, without commas and dollar sign; None where there is none.

    >>> final_number("so it costs\\n#### $1,250.50")
    Decimal('1250.50')
    """
    match = re.search(r"####\s*\$?(-?)\$?([0-9][0-9,]*\.?[0-9]*|\.[0-9]+)", text)
    return Decimal(match[1] + match[2].replace(",", "")) if match else None


def check_conversation(conversation: dict) -> dict:
    """Returns it. UserError if it is malformed or has no assistant message."""
    if len(checked_turns(conversation)) < 2:
        raise UserError("messages[0] is the only message; an assistant message must follow")
    return conversation


# -----------------------------------------------------------------------------
# The mixtures that mid_train and chat_sft train on

Makers = dict[str, Callable[[], Task]]  # a function for each name, which loads the data


def available_tasks(makers: Makers, names: list[str], compute: Compute, explicit: bool) -> dict[str, Task]:
    """The tasks with these names, in that order. The main rank downloads; all ranks get the same tasks.

    A task whose data cannot be reached is skipped with a printed reason; if the user asked for it (`explicit`) it is an
    error. So are an unknown name, broken data, and no task left.
    """
    unknown = [name for name in names if name not in makers]
    if unknown or not names:
        raise UserError(f"{', '.join(unknown) or 'no task'} is not one of the tasks here: {', '.join(makers)}, "
                        "nor a file of conversations, which has a dot in its name")
    tasks = {}
    for name in names:
        try:
            tasks[name] = compute.main_first(makers[name])
        except Unreachable as error:
            if explicit:
                raise
            print0(f"{name} is skipped: {error}")
    if not tasks:
        raise UserError(f"none of {', '.join(names)} can be loaded; without a connection use --tasks=SampleWorld")
    return tasks


def mixtures(
    train: Makers, val: Makers, names: str, compute: Compute, explicit: bool, read: Callable[[str, str], Task]
) -> tuple[TaskMixture, TaskMixture]:  # fmt: skip
    """(training, validation) data of the tasks in `names`, as "SmolTalk,my.jsonl".

    A name with a dot is a file, of which `read(name, split)` is a task. If there are files, only their held-out parts are
    for validation. A persona has none; alone, SampleWorld's is used.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    files = [name for name in listed if "." in name]
    tasks = available_tasks(train | {file: partial(read, file, "train") for file in files}, listed, compute, explicit)
    val = {file: partial(read, file, "val") for file in files} or val
    val_names = [name for name in tasks if name in val] or ["SampleWorld"]
    val_tasks = available_tasks(val, val_names, compute, explicit)
    return TaskMixture(list(tasks.values())), TaskMixture(list(val_tasks.values()))
