"""What a sandboxed program may do, how its end is reported, and tests that call it."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import MAX_OUTPUT_BYTES, execute_code
from nanochat.sandbox import LAYERS, is_safe

ACTIVE = execute_code("", allow_unsafe=True).layers
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these layers")


def test_a_program_runs_as_the_main_module_and_its_output_is_returned(monkeypatch):
    monkeypatch.setenv("API_KEY", "hush")
    code = """
import os, sys, threading
from dataclasses import dataclass

@dataclass
class Point:
    x: int

if __name__ == "__main__":
    threading.Thread(target=lambda: print(Point(1), "草莓")).start()
    print(sorted(os.environ), sys.argv[1:], repr(sys.stdin.read()), file=sys.stderr)
"""
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "Point(x=1) 草莓\n"), result
    assert result.stderr == "['HOME', 'LANG', 'PATH', 'TMPDIR'] [] ''\n"
    assert result.error is None and not result.timeout and not result.memory_exceeded and result.layers == ACTIVE


@pytest.mark.parametrize("code, error", [
    ("1 / 0", "ZeroDivisionError: division by zero"), ("assert 1 == 2, 'no'", "AssertionError: no"),
    ("def f(:", "SyntaxError"), ("a\0b", ("SyntaxError", "ValueError")),  # the second before Python 3.12
    ("'\ud800'", "UnicodeEncodeError"), ("raise ValueError('\\ud800' + 'x' * 10**7)", "ValueError: \\ud800xxx"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"), ("exit()", "SystemExit"), ("input()", "EOFError"),
    ("import ctypes; ctypes.string_at(0)", "killed by signal 11"), ("import nanochat", "ModuleNotFoundError"),
    ("import os; os._exit(3)", "left early with code 3"), ("import os; os.fork()", "PermissionError"),
    ("import atexit, os; atexit.register(os._exit, 7)", "left after its end with code 7"),
])  # fmt: skip
def test_failures_are_named(code, error):
    result = execute_code(code)
    assert not result.success and result.error.startswith(error) and len(result.error) < 600, result
    assert not result.timeout and not result.memory_exceeded


def test_the_traceback_shows_only_frames_of_the_program():
    lines = execute_code("def f():\n    1 / 0\nf()").stderr.splitlines()
    assert lines[1:3] == ['  File "program.py", line 3, in <module>', '  File "program.py", line 2, in f']


def test_timeout_kills_the_program_and_keeps_its_output():
    result = execute_code("print('started', flush=True)\nwhile True: pass", timeout=0.5)
    assert result.timeout and result.error == "timed out after 0.5 seconds" and not result.success
    assert result.stdout == "started\n" and result.layers == ACTIVE


@pytest.mark.parametrize("ending", ["", "time.sleep(60)"])
def test_unsafe_children_end_with_the_program(ending):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); "
    result = execute_code(code + ending, timeout=1, allow_unsafe=True, layers=("limits",))
    assert result.timeout == bool(ending) and result.layers == ("limits",)
    child, deadline = int(result.stdout), time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline


@on_linux
def test_the_memory_limit_is_an_argument():
    result = execute_code("x = bytearray(200 * 2**20)", maximum_memory_bytes=128 * 1024 * 1024)
    assert not result.success and result.memory_exceeded and not result.timeout


def test_output_is_bounded_and_decoded():
    result = execute_code("import sys; sys.stdout.buffer.write(b'a\\xff' + b'x' * (3 * 2**20))")
    assert result.success and result.stdout[:3] == "a\ufffdx" and len(result.stdout) == MAX_OUTPUT_BYTES


@on_linux
def test_flags_that_a_program_sets_on_its_output_do_no_harm():
    program = "import fcntl, os\nprint('x', flush=True)\nfor fd in (1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT | os.O_APPEND)"
    result = execute_code(program)
    assert result.success and result.stdout == "x\n", result


def test_an_unsafe_program_can_leave_folders_deeper_than_pythons_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    assert execute_code(code, allow_unsafe=True, layers=("limits",)).success
    subprocess.run(["rm", "-rf", tmp_path], check=True)  # which pytest could not remove either


def test_the_folder_is_empty_is_writable_with_namespaces_only_and_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, tempfile; print(os.listdir()); open('a', 'w').close(); print(tempfile.gettempdir(), os.listdir())"
    result = execute_code(code, layers=LAYERS[1:])
    assert result.stdout == "[]\n" and result.error.startswith("PermissionError")
    if "namespaces" in ACTIVE:
        assert execute_code(code).stdout == "[]\n/tmp ['a']\n"
    assert os.listdir(tmp_path) == []


@on_linux
@pytest.mark.parametrize("layers", [(), ("limits",), ("seccomp", "limits"), ("landlock", "limits"), LAYERS[:3]])
def test_too_few_layers_are_refused_unless_allowed(layers):
    assert is_safe(ACTIVE)
    with pytest.raises(UserError, match="it lacks .*limits|it lacks namespaces.*--allow-unsafe-code"):
        execute_code("print('ran')", layers=layers)
    result = execute_code("print('ran')", layers=layers, allow_unsafe=True)
    assert result.success and result.stdout == "ran\n" and result.layers == layers


@pytest.mark.skipif("namespaces" not in ACTIVE, reason="no namespaces here")
def test_a_system_that_forbids_mounts_falls_back_to_the_other_layers(monkeypatch, tmp_path):
    source = Path(execution.SANDBOX).read_text()
    monkeypatch.setattr(execution, "SANDBOX", str(tmp_path / "sandbox.py"))
    (tmp_path / "sandbox.py").write_text(source.replace('call("mount"', 'call("no_mount"'))
    assert execute_code("print(1)").layers == LAYERS[1:]


@pytest.mark.parametrize("body, tests, error", [
    ("return 2 * x", "assert f(2) == 4 and f(x=-1) == -2", None),
    ("return (None, [2.5, {'a': {3}}], frozenset({4}), b'\\xff', True, 1j, 10**400)",
     "assert f(0) == (None, [2.5, {'a': {3}}], frozenset({4}), b'\\xff', True, 1j, 10**400)", None),
    ("return x", "assert f(float('inf')) == float('inf') and f('\\ud800\\0草') == '\\ud800\\0草'", None),
    ("import collections; return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", None),
    ("import enum; return enum.IntEnum('E', 'A B').B", "assert f(0) == 2", None),
    ("return {}[x]", "try: f(7)\nexcept KeyError: pass\nelse: raise SystemExit", None),
    ("class E(Exception): pass\n    raise E('no')", "try: f(7)\nexcept RuntimeError as e: assert str(e) == 'no'", None),
    ("import os; os._exit(0)", "try: f(7)\nexcept Exception: pass", "SystemExit: the program ended during a call"),
    ("import os; os.close(3)", "try: f(7)\nexcept Exception: pass", "SystemExit: the program ended during a call"),
    ("import os; os.write(3, b'x')", "try: f(7)\nexcept Exception: pass", "timed out"),
    ("return 2", "assert f(2) == 5, 'no'", "AssertionError: no"),
    ("pass\ndel f", "f(1)", "AttributeError"),
    ("pass\n1 / 0", "f(1)", "ZeroDivisionError"),
    ("return open", "f(1)", "TypeError: a builtin_function_or_method is not plain data"),
    ("return 1", "f(open)", "TypeError: a builtin_function_or_method is not plain data"),
    ("return 1", "while True: f(1)", "timed out"),
    ("return 1", "x = [0] * 10**9", "MemoryError"),
])  # fmt: skip
def test_tests_call_the_functions_of_a_program(body, tests, error):
    result = execute_code(f"def f(x):\n    {body}\n", timeout=2 if error else 5, tests=f"from program import f\n{tests}")
    assert (result.error or "").startswith(error or "") and result.success == (error is None), result
