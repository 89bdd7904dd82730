"""HumanEval: write the body of a Python function from its signature and docstring.

An answer is right when the function passes the tests that come with the problem. The function and the tests run in
the sandbox of `nanochat.execution`, in a process each.

Chen et al. 2021, https://arxiv.org/abs/2107.03374. Hub: openai/openai_humaneval.
"""

import re

from nanochat.execution import execute_code
from tasks.common import Task, load_hub_dataset, single_turn


class HumanEval(Task):
    """164 problems, all of them the test split. `layers`: the layers of the sandbox that are active on this system.

    UserError if they are too few, unless `allow_unsafe`: at the start, not after an hour of evaluation.
    """

    eval_type = "generative"

    def __init__(self, allow_unsafe: bool = False, **view):
        super().__init__(**view)
        self.allow_unsafe = allow_unsafe
        self.layers = execute_code("", allow_unsafe=allow_unsafe).layers
        self.rows = load_hub_dataset("openai/openai_humaneval", None, "test")

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        program = row["prompt"] + row["canonical_solution"]
        return single_turn(row["prompt"], program, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the code in `completion`, a function's body or a whole program, passes the tests."""
        prompt = conversation["messages"][0]["content"]
        return passes(prompt, extract_code(completion), conversation["test"], conversation["entry_point"], self.allow_unsafe)


def extract_code(completion: str) -> str:
    """The first fenced block of code, or everything if nothing is fenced.

    >>> extract_code("Sure:\\n```python\\n    return 1\\n```\\nIt returns 1.")
    '    return 1\\n'
    """
    fenced = re.search(r"```[\w+]*[ \t]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    return fenced[1] if fenced else completion


def passes(prompt: str, code: str, test: str, entry_point: str, allow_unsafe: bool = False) -> bool:
    """Whether `prompt + code` defines a function `entry_point` that passes `check` of `test`.

    The tests may use what the prompt defines besides the function. A prompt is a program by itself:
    its last function has its docstring for a body.
    """
    tests = f"{prompt}\nfrom program import {entry_point}\n{test}\ncheck({entry_point})\n"
    return execute_code(prompt + code, tests=tests, allow_unsafe=allow_unsafe).success
