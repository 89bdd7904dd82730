"""HumanEval: what is taken as code, what passes, and that no pretence does."""

import pytest

from tasks.common import check_conversation
from tasks.humaneval import HumanEval, extract_code, passes


@pytest.mark.parametrize(
    "completion, code",
    [
        ("    return 1\n", "    return 1\n"),
        ("```python\ndef f():\n    return 1\n```", "def f():\n    return 1\n"),
        ("Sure!\n```\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"),
        ("```py\n    return 1\n", "    return 1\n"),  # cut before the fence ends
        ("```python3  \nx = '`'\n```", "x = '`'\n"),
        ("", ""),
    ],
)
def test_extract_code(completion, code):
    assert extract_code(completion) == code


PROMPT = 'def double(x):\n    """Twice x."""\n'
TEST = 'def check(candidate):\n    """What is asked."""\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n'


def test_passes_what_is_right():
    assert passes(PROMPT, "    return x + x\n", TEST, "double")
    assert passes(PROMPT, "def double(x):\n    return x * 2", TEST, "double")


def test_the_tests_may_use_what_the_prompt_defines():
    prompt = 'def half(x):\n    return x / 2\n\ndef double(x):\n    """Twice x."""\n'
    test = "def check(candidate):\n    assert candidate(half(6)) == 6\n"
    assert passes(prompt, "    return x * 2", test, "double")
    assert not passes(prompt, "    return x\ndef half(x): return 6", test, "double")


@pytest.mark.parametrize(
    "body",
    [
        "    return 4\n",
        "    return\n",
        "return x + x\n",
        "    print('passed')\n",
        "    import os; print('success'); os._exit(0)\n",
        "    raise SystemExit(0)\n",
        "    return x\nimport sys; print('all tests passed'); sys.exit(0)\n",
        "    return x\ndef check(candidate): pass\n",
        "    return x\nsuccess = True\nprint('ExecutionResult(success=True)')\n'''",
        '    return x\n"""',
        "    return x\n\\",
        "    class Any(int):\n        __eq__ = lambda *_: True\n        __hash__ = None\n    return Any()\n",
        "    return 4 if x == 2 else -2 if 'x' in globals() else check\n",
        "    return x\nexit = quit = lambda *_: None\nAssertionError = Warning\n",
    ],
)
def test_no_fake_success(body):
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
