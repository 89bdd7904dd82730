"""Run Python that a model wrote where it can do no harm, and say how it went.

The idea: a fresh interpreter runs `nanochat/sandbox.py`, which gives up every right it can before the
program starts (layers; its docstring names them), shares nothing with us but three files that we made
for it, and ends when the program is done or its time is up, with all its processes. A system that lacks
the layers to keep the program from files and network is refused, unless the caller accepts that.

`execute_code` runs one program, and success means that it came to its end: printing "passed" is output,
leaving by `sys.exit(0)` a failure. A program that digs through its own interpreter could still lie about
itself. `execute_tests` is for whoever does not trust it: there the tests run in another process, which
asks the program for plain values, and no lie is worth more than a wrong answer.

What this does not do: keep out who knows a hole in the kernel. And where too few layers were accepted,
the program reaches what we reach, and a child of its that starts a session of its own outlives it.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from nanochat.common import UserError
from nanochat.sandbox import LAYERS, NO_NAMESPACES, WRITABLE

# What the fresh interpreter is told: the sandbox is what stdin begins with, compiled by us (6 ms less for each start).
BOOT = "import marshal, os, sys; exec(marshal.loads(os.pread(0, int(sys.argv[1]), 0)))"
MAX_OUTPUT_BYTES = 1024 * 1024  # kept of each of stdout and stderr
MAX_FILE_BYTES = 16 * 1024 * 1024  # of any file the code writes, its output included
MAX_REPORT_BYTES = 64 * 1024
SECONDS_TO_COLLECT = 2.0  # for the runner to kill and collect its processes; it needs a hundredth of it


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # the code ran to its end
    stdout: str
    stderr: str
    error: str | None  # why not, in short; None on success
    timeout: bool
    memory_exceeded: bool
    layers: tuple[str, ...]  # what it ran under; () where it ended before it could say so


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 256 * 1024 * 1024,
    allow_unsafe: bool = False,
    layers: tuple[str, ...] = LAYERS,
) -> ExecutionResult:
    """Run a Python program and wait for it, at most `timeout` seconds of wall-clock time.

    The memory limit is on address space. Output beyond 1 MiB is cut. `layers` are those to try.
    Never raises for anything the code does; raises UserError, without having run it, where the
    layers that hold on this system are too few and `allow_unsafe` is not set.

    >>> execute_code("print(6 * 7)").stdout
    '42\\n'
    """
    request = {"program": code, "function": None}
    return in_sandbox(request, {}, timeout, maximum_memory_bytes, allow_unsafe, layers)


def execute_tests(
    tests: str,
    solution: str,
    function: str,
    prompt: str = "",
    timeout: float = 5.0,
    maximum_memory_bytes: int = 256 * 1024 * 1024,
    allow_unsafe: bool = False,
    layers: tuple[str, ...] = LAYERS,
) -> ExecutionResult:
    """Run tests of a function that the program `solution` defines, in another process than the program.

    `prompt` runs before the tests and defines what else they use. Arguments and results travel as
    copies: None, numbers, strings, bytes, lists, tuples, sets, dicts and their subclasses, nothing
    else. That a call changes its arguments is not seen by the tests. An exception arrives as one of
    the same builtin name, else as RuntimeError.

    >>> execute_tests("assert double(2) == 4", "def double(x): return 2 * x", "double").success
    True
    """
    request = {"program": solution, "function": function}
    tests = {"prompt": prompt, "tests": tests, "function": function}
    return in_sandbox(request, tests, timeout, maximum_memory_bytes, allow_unsafe, layers)


def active_layers() -> tuple[str, ...]:
    """The layers that hold on this system."""
    return execute_code("", allow_unsafe=True).layers


def in_sandbox(
    request: dict, tests: dict, timeout: float, memory: int, allow_unsafe: bool, layers: tuple[str, ...]
) -> ExecutionResult:
    """One run, or two where the namespaces that this process could make a moment ago cannot be made now."""
    limits = {"cpu": int(timeout) + 2, "memory": memory, "file": MAX_FILE_BYTES}
    request = {**request, **limits, "allow_unsafe": allow_unsafe}
    without = tuple(layer for layer in layers if layer != "namespaces")
    attempts = [layers, without] if "namespaces" in layers and has_namespaces() else [without]
    for attempt in attempts:
        exit_code, report, timed_out, stdout, stderr = start({**request, "layers": attempt}, tests, timeout)
        if exit_code != NO_NAMESPACES:
            break
    active, status, error = (report.split("\n", 2) + ["", ""])[:3]  # the first line is there before the program starts
    active = tuple(active.split())
    if status == "refused":
        raise UserError(
            f"this system cannot keep model-written code apart: it lacks {', '.join(x for x in LAYERS if x not in active)}. "
            "allow_unsafe=True (in scripts: --allow-unsafe-code) runs such code with access to your files and network."
        )
    if timed_out:
        error = f"timed out after {timeout:g} seconds"
    elif status == "ended":
        error = None
    elif not status:
        error = f"the sandbox was killed from outside, or failed: exit code {exit_code}"
    return ExecutionResult(
        success=error is None,
        stdout=stdout,
        stderr=stderr,
        error=error,
        timeout=timed_out,
        memory_exceeded=error is not None and error.startswith("MemoryError:"),
        layers=active,
    )


@lru_cache(maxsize=None)
def has_namespaces() -> bool:
    """Asked once per process, for where there are none a failed attempt costs a start."""
    limits = {"cpu": 10, "memory": 2**28, "file": 0}
    request = {"program": "", "function": None, "allow_unsafe": True, "layers": ("namespaces",), **limits}
    return start(request, {}, timeout=10.0)[0] != NO_NAMESPACES


def start(request: dict, tests: dict, timeout: float) -> tuple[int, str, bool, str, str]:
    """(exit code of the runner, its report, whether time ran out, stdout, stderr) of one sandbox."""
    deadline = time.monotonic() + timeout
    with (
        tempfile.TemporaryDirectory(prefix="nanochat_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        sandbox = compiled_sandbox()
        first = marshal.dumps({**request, "program": encodable(request["program"])})
        second = marshal.dumps({name: encodable(text) for name, text in tests.items()})
        stdin.write(sandbox + first + second)  # the program is started before the second part is read
        stdin.flush()
        hear, tell = os.pipe()
        home = WRITABLE if "namespaces" in request["layers"] else folder
        arguments = (len(sandbox), len(sandbox + first), tell, os.getpid())
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", BOOT, *map(str, arguments)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(tell,),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            os.close(tell)
            tell = None
            report, timed_out = wait_for(process, hear, deadline)
        finally:
            os.close(hear)
            if tell is not None:
                os.close(tell)
        return process.returncode, report, timed_out, read_text(stdout), read_text(stderr)


@lru_cache(maxsize=None)
def compiled_sandbox() -> bytes:
    path = Path(__file__).with_name("sandbox.py")
    return marshal.dumps(compile(path.read_bytes(), str(path), "exec"))


def wait_for(process: subprocess.Popen, hear: int, deadline: float) -> tuple[str, bool]:
    """The report, and whether time ran out before it was there. No process is left, also when we are interrupted."""
    report = bytearray()

    def read(until: float, more) -> None:
        """Read the pipe until its end: the runner, which holds it to the last, has then collected every process."""
        while more() and (left := until - time.monotonic()) > 0 and waiting.poll(left * 1000):
            data = os.read(hear, MAX_REPORT_BYTES)
            if not data or len(report) > MAX_REPORT_BYTES:
                ended.append(True)
            report.extend(data)

    ended = []
    waiting = select.poll()  # Popen.wait(timeout) would look every few, at last every 50 milliseconds
    waiting.register(hear, select.POLLIN)
    try:
        read(deadline, more=lambda: not ended and not report.endswith(b"\0"))
        timed_out = not ended and not report.endswith(b"\0")
        if timed_out:
            process.terminate()  # the runner kills the rest
        read(time.monotonic() + SECONDS_TO_COLLECT, more=lambda: not ended)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # start_new_session made its id the group's
        except (ProcessLookupError, PermissionError):
            pass  # nothing is left (macOS says EPERM where only a zombie is)
        process.wait()
    return report.decode("utf-8", errors="replace").removeprefix("\n").removesuffix("\0"), timed_out


def encodable(text: str) -> str:
    """Half a surrogate pair, which no source file can hold, becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode()


def read_text(file: BinaryIO) -> str:
    """The beginning of a file as text; read by offset, as the process has moved the shared position."""
    return os.pread(file.fileno(), MAX_OUTPUT_BYTES, 0).decode("utf-8", errors="replace")
