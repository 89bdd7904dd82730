"""Programs that end well, end badly, never end, take too much, or look where they should not."""

import os
import re
import sys
import tempfile
import time

import psutil
import pytest

from nanochat.common import UserError
from nanochat.execution import MAX_OUTPUT_BYTES, active_layers, execute_code, execute_tests, has_namespaces
from nanochat.sandbox import LAYERS, is_safe

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these layers")
with_namespaces = pytest.mark.skipif(not has_namespaces(), reason="no namespaces here")


def test_success():
    result = execute_code("import sys\nprint(6 * 7)\nprint('oops', file=sys.stderr)")
    assert result.success and result.stdout == "42\n" and result.stderr == "oops\n"
    assert result.error is None and not result.timeout and not result.memory_exceeded


def test_it_is_a_main_program_that_can_use_the_standard_library():
    code = """
from dataclasses import dataclass
from typing import List
import collections, math, re, threading

@dataclass
class Point:
    x: int

if __name__ == "__main__":
    thread = threading.Thread(target=lambda: print(Point(1), "草莓"))
    thread.start()
"""
    result = execute_code(code)
    assert result.success and result.stdout == "Point(x=1) 草莓\n", result


@pytest.mark.parametrize(
    "code, error",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("a\0b", ("SyntaxError", "ValueError")),  # the second before Python 3.12
        ("raise KeyError('k')", "KeyError: 'k'"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class Quiet(Exception):\n    def __len__(self): return 0\nraise Quiet", "Quiet"),
        ("class Mute(Exception):\n    def __str__(self): 1 / 0\nraise Mute", "Mute"),
        ("raise ValueError('\\ud800' + 'x' * 10**7)", "ValueError: \\ud800xxx"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
)
def test_exceptions(code, error):
    result = execute_code(code)
    assert not result.success and result.error.startswith(error) and len(result.error) < 600
    assert not result.timeout and not result.memory_exceeded


def test_the_traceback_shows_the_programs_own_frames():
    assert execute_code("def f():\n    1 / 0\nf()").stderr.splitlines()[:4] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
        '  File "program.py", line 2, in f',
        "ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "exit()", "raise SystemExit", "import os; os._exit(0)"])
def test_leaving_early_is_no_success_whatever_the_exit_code(leave):
    result = execute_code(f"print('all tests passed')\n{leave}\n1 / 0")
    assert not result.success and result.error and result.stdout in ("", "all tests passed\n")


def test_a_report_of_the_programs_own_does_not_count():
    code = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b" ")
        os.write(fd, b"success")
    except OSError:
        pass
os._exit(0)
"""
    assert not execute_code(code).success


def test_timeout_ends_the_program_and_keeps_what_it_said():
    result = execute_code("print('started', flush=True)\nwhile True: pass", timeout=0.5)
    assert not result.success and result.timeout and result.stdout == "started\n"
    assert result.error == "timed out after 0.5 seconds"


def test_a_program_is_one_process():
    code = "import os, subprocess, sys\ntry: os.fork()\nexcept OSError as e: print(e)\nsubprocess.run([sys.executable])"
    result = execute_code(code)
    assert result.error.startswith("PermissionError") and result.stdout == "[Errno 13] Permission denied\n"


@pytest.mark.parametrize("ending", ["", "import time; time.sleep(60)"])
def test_where_it_may_have_children_they_end_with_the_program(ending):
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
{ending}
"""
    result = execute_code(code, timeout=1, allow_unsafe=True, layers=("limits",))
    assert result.timeout == bool(ending) and result.layers == ("limits",)
    assert gone(int(result.stdout))


def gone(pid: int) -> bool:
    """Whether the process ends soon; a killed one may stay as a zombie where nobody collects it."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@on_linux
@pytest.mark.parametrize("code", ["x = [0] * 10**9", "x = []\nwhile True: x.append([])", "x = bytearray(200 * 2**20)"])
def test_memory(code):
    result = execute_code(code, maximum_memory_bytes=128 * 1024 * 1024)
    assert not result.success and result.memory_exceeded and not result.timeout


def test_a_flood_of_output_is_cut():
    result = execute_code("print('x' * (3 * 2**20))")
    assert result.success and result.stdout == "x" * MAX_OUTPUT_BYTES
    result = execute_code("while True: print('x' * 1000)")
    assert not result.success and not result.timeout and "File too large" in result.error
    assert len(result.stdout) == MAX_OUTPUT_BYTES


def test_output_that_is_no_utf8():
    assert execute_code("import sys; sys.stdout.buffer.write(b'a\\xffb')").stdout == "a\ufffdb"


def test_there_is_no_stdin():
    assert execute_code("input()").error.startswith("EOFError")
    assert execute_code("import sys; print(repr(sys.stdin.read()))").stdout == "''\n"


def test_the_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("API_KEY", "hush")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    result = execute_code("import os, sys\nprint(sorted(os.environ), sys.argv[1:])\nimport nanochat")
    assert result.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR'] []\n"
    assert result.error == "ModuleNotFoundError: No module named 'nanochat'"


@with_namespaces
def test_it_lives_in_an_empty_folder_that_vanishes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
import os, shutil, tempfile
print(os.getcwd(), os.listdir("."), tempfile.mkdtemp(), os.environ["HOME"], os.environ["TMPDIR"])
open("note", "w").write("x")
os.rename("note", "letter")
shutil.copyfile("letter", "copy")
print(sorted(os.listdir(".")))
"""
    result = execute_code(code)
    assert result.success, result
    assert re.fullmatch(r"/tmp \[\] /tmp/\w+ /tmp /tmp\n\['copy', 'letter', '\w+'\]\n", result.stdout)
    assert os.listdir(tmp_path) == []


@on_linux
def test_without_namespaces_it_can_write_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = execute_code("import os\nprint(os.listdir('.'))\nopen('note', 'w')", layers=LAYERS[1:])
    assert result.stdout == "[]\n" and result.error.startswith("PermissionError") and os.listdir(tmp_path) == []


@on_linux
@pytest.mark.parametrize("layers", [(), ("limits",), ("seccomp", "limits"), ("landlock", "limits"), LAYERS[:3]])
def test_too_few_layers_are_refused_unless_that_is_wanted(layers):
    with pytest.raises(UserError, match="it lacks .*limits|it lacks namespaces.*--allow-unsafe-code"):
        execute_code("print('ran')", layers=layers)
    result = execute_code("print('ran')", layers=layers, allow_unsafe=True)
    assert result.success and result.stdout == "ran\n" and result.layers == layers


@on_linux
def test_what_holds_here_is_told():
    active = active_layers()
    assert is_safe(active) and execute_code("1 / 0").layers == active
    assert execute_code("while True: pass", timeout=0.5).layers == active


@with_namespaces
def test_limits_hold_for_files_and_descriptors():
    assert "File too large" in execute_code("f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))").error
    assert "Too many open files" in execute_code("fs = [open('f', 'w') for _ in range(100)]").error


def test_the_parent_leaks_nothing():
    execute_code("print(1)")
    before = psutil.Process().num_fds()
    for code in ("print(1)", "1 / 0", "import os; os._exit(1)"):
        execute_code(code)
    assert psutil.Process().num_fds() == before and psutil.Process().children() == []


# -----------------------------------------------------------------------------
# Tests in a process of their own


HONEST = [  # the body of f, the tests
    ("return 2 * x", "assert f(2) == 4 and f(x=-1) == -2"),
    ("return None", "assert f(1) is None"),
    ("return (1, [2.5, {'a': {3}}], frozenset({4}), b'\\xff', True, 1j)",
     "assert f(0) == (1, [2.5, {'a': {3}}], frozenset({4}), b'\\xff', True, 1j)"),
    ("return x", "assert f(float('inf')) == float('inf') and f(-0.0) == 0 and str(f(-0.0)) == '-0.0'"),
    ("return float('nan')", "assert f(0) != f(0)"),
    ("return 10 ** x", "assert f(10000) == 10 ** 10000 and f(18) == 10 ** 18"),
    ("return x", "assert f('\\ud800\\n\\0草莓') == '\\ud800\\n\\0草莓'"),
    ("import collections; return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
    ("import collections; d = collections.defaultdict(list); d[x].append(1); return d", "assert f(3) == {3: [1]}"),
    ("import collections; return collections.namedtuple('P', 'x y')(x, 2)", "assert f(1) == (1, 2)"),
    ("import enum; return enum.IntEnum('E', 'A B').B", "assert f(0) == 2"),
    ("return {x: 1}.keys()", "assert f(1) == {1}"),
    ("from fractions import Fraction; return Fraction(x, 2)", "assert f(3) == 1.5"),
    ("return {}[x]", "try: f(7)\nexcept KeyError: pass\nelse: raise SystemExit"),
    ("class Own(Exception): pass\n    raise Own('text')", "try: f(7)\nexcept RuntimeError as e: assert str(e) == 'text'"),
    ("return b'x'.decode('utf-16')", "try: f(7)\nexcept RuntimeError as e: assert 'utf-16' in str(e)"),
    ("return [[0] * 100] * 100", "assert f(0) == [[0] * 100] * 100"),
    ("print('said', x); return x", "print('heard', f(5))"),
]


@pytest.mark.parametrize("body, tests", HONEST)
def test_honest_functions_pass_their_tests(body, tests):
    result = execute_tests(tests, f"def f(x):\n    {body}\n", "f")
    assert result.success, result


def test_tests_that_fail_say_why():
    result = execute_tests("def check():\n    assert f(2) == 5, 'no'\ncheck()", "def f(x): return 2 * x", "f")
    assert result.error == "AssertionError: no" and 'File "tests.py", line 2, in check' in result.stderr
    assert execute_tests("f(1)", "def g(x): pass", "f").error.startswith("AttributeError")
    assert execute_tests("f(1)", "1 / 0", "f").error.startswith("ZeroDivisionError")
    assert execute_tests("f(1)", "def f(x): return open", "f").error.startswith("TypeError: the value holds a builtin_")
    assert execute_tests("f(open)", "def f(x): return 1", "f").error.startswith("TypeError: the value holds a builtin_")
    assert execute_tests("while True: f(1)", "def f(x): return 1", "f", timeout=0.5).timeout
    assert execute_tests("x = [0] * 10**9", "def f(x): return 1", "f").memory_exceeded
    assert execute_tests("assert f(helper)", "def f(x): return x == 1", "f", prompt="helper = 1").success
