"""HumanEval: extraction of the code, and what passes."""

import pytest

from tasks.common import check_conversation
from tasks.humaneval import HumanEval, extract_code, passes

PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = 'def check(candidate):\n    """What is asked."""\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n'


@pytest.mark.parametrize("completion, code", [
    ("    return 1\n", "    return 1\n"),
    ("Sure!\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"),
    ("```py\n    return 1\n", "    return 1\n"),  # cut before the fence ends
    ("```python3  \nx = '`'\n```", "x = '`'\n"),
    ("", ""),
])  # fmt: skip
def test_extract_code(completion, code):
    assert extract_code(completion) == code


def test_right_answers_pass():
    assert passes(PROMPT, "    return x + x\n", TEST, "double")
    assert passes(PROMPT, "def double(x):\n    return x * 2", TEST, "double")


def test_tests_may_use_what_the_prompt_defines():
    prompt = "def half(x):\n    return x / 2\n\n" + PROMPT
    test = "def check(candidate):\n    assert candidate(half(6)) == 6\n"
    assert passes(prompt, "    return x * 2", test, "double")
    assert not passes(prompt, "    return x\ndef half(x): return 6", test, "double")


@pytest.mark.parametrize("body", [
    "    return 4\n",
    "return x + x\n",
    "    import os; print('success'); os._exit(0)\n",
    "    return x\nimport sys; print('all tests passed'); sys.exit(0)\n",
    "    return x\ndef check(candidate): pass\n",
    '    return x\n"""',
    "    class Any(int):\n        __eq__ = lambda *_: True\n        __hash__ = None\n    return Any()\n",
    "    return x\nexit = quit = lambda *_: None\nAssertionError = Warning\n",
])  # fmt: skip
def test_wrong_answers_and_fakes_fail(body):
    assert not passes(PROMPT, body, TEST, "double")


def test_humaneval(hub):
    task = HumanEval()
    assert len(task) == 6 and (task.eval_type, task.baseline) == ("generative", 0.0)
    for conversation in HumanEval(step=2):
        check_conversation(conversation)
        prompt, program = (message["content"] for message in conversation["messages"])
        assert task.evaluate(conversation, program.removeprefix(prompt))
        assert task.evaluate(conversation, f"Here it is:\n\n```python\n{program}\n```\n")
        assert not task.evaluate(conversation, "    return None\n")
