"""HumanEval: write the body of a Python function from its signature and docstring.

An answer is right when the function passes the tests that come with the problem, which run in
the sandbox of `nanochat.execution`.

Chen et al. 2021, https://arxiv.org/abs/2107.03374. Hub: openai/openai_humaneval.
"""

from __future__ import annotations

import re

from nanochat.execution import execute_code
from tasks.common import Task, load_hub_dataset


class HumanEval(Task):
    """164 problems, all of them the test split."""

    eval_type = "generative"

    def __init__(self, **view):
        super().__init__(**view)
        self.rows = load_hub_dataset("openai/openai_humaneval", None, "test")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the code in `completion`, a function's body or a whole program, passes the tests."""
        prompt = conversation["messages"][0]["content"]
        return passes(prompt + extract_code(completion), conversation["test"], conversation["entry_point"])


def extract_code(completion: str) -> str:
    """The first fenced block of code, or everything where nothing is fenced.

    >>> extract_code("Sure:\\n```python\\n    return 1\\n```\\nIt returns 1.")
    '    return 1\\n'
    """
    fenced = re.search(r"```[\w+]*[ \t]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    return fenced[1] if fenced else completion


def passes(solution: str, test: str, entry_point: str) -> bool:
    """Whether `solution` defines a function `entry_point` that passes `check` of `test`.

    The solution goes in as a string that is executed first, so that an open quote or a trailing
    backslash in it cannot swallow the tests. That it leaves early or prints "passed" helps it
    nothing: only a program that runs to its end, past the last test, is a success.
    """
    return execute_code(f"exec({solution!r})\n{test}\ncheck({entry_point})\n").success
