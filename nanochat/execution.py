"""Run Python that a model wrote where it can do no harm, and report how it ended.

A fresh interpreter runs `nanochat/sandbox.py`, which gives up every right it can, layer by layer, before the program
starts: it gets no files, environment, network or input of ours, and ends with all its processes when its time is up. A
system that lacks the layers for that is refused, unless the caller accepts that the program has access to all that we
have, and that a child of it that starts its own session outlives it.

Success without tests means that the program came to its end, which a program that inspects its own interpreter can
fake. Tests run in another confined process, to which the program can only send values; to fake their success takes a
flaw in Python's `marshal`, as to break out takes a flaw in the kernel.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.sandbox import LAYERS, WRITABLE, is_safe

SANDBOX = str(Path(__file__).with_name("sandbox.py"))
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": WRITABLE, "TMPDIR": WRITABLE}
MAX_OUTPUT_BYTES = 1024 * 1024  # returned of each of stdout and stderr
SECONDS_TO_COLLECT = 2.0  # for killing and collecting the processes, which takes a hundredth of it
MAX_FILE_BYTES = 16 * 1024 * 1024  # of any file the program writes, its output included


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # the program, and its tests if there are any, came to their end
    stdout: str
    stderr: str
    error: str | None  # why not, in short; None on success
    timeout: bool
    memory_exceeded: bool
    layers: tuple[str, ...]  # those that were active; () if the program ended before it could report them


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 256 * 1024 * 1024,
    tests: str | None = None,
    allow_unsafe: bool = False,
    layers: tuple[str, ...] = LAYERS,
) -> ExecutionResult:
    """Run a Python program, then the tests if there are any, at most `timeout` seconds of wall-clock time.

    `tests` import what they test from the module `program`. Arguments and results are copies, made of None, numbers,
    strings, bytes, lists, tuples, sets and dicts; exceptions arrive as the builtin of the same name or RuntimeError.
    The memory limit is on address space. Output beyond 1 MiB is cut. `layers` are those to try.
    Never raises for anything the program does. UserError if too few layers are active, unless `allow_unsafe`.

    >>> execute_code("def double(x): return 2 * x", tests="from program import double; assert double(2) == 4").success
    True
    """
    request = {"program": code, "layers": tuple(layers), "allow_unsafe": bool(allow_unsafe), "file": MAX_FILE_BYTES}
    request |= {"cpu": int(timeout) + 2, "memory": maximum_memory_bytes}
    report, stdout, stderr, timed_out = run_sandbox(request, tests, timeout)
    reported, status, error = (report.split("\n", 2) + ["", ""])[:3]  # the first line precedes the program
    active = tuple(reported.split()[1:])
    if reported and not (is_safe(active) or allow_unsafe):
        missing = ", ".join(layer for layer in LAYERS if layer not in active)
        raise UserError(
            f"this system cannot isolate model-written code: it lacks {missing}. allow_unsafe=True "
            "(in scripts: --allow-unsafe-code) runs such code with access to your files and network."
        )
    if timed_out:
        error = f"timed out after {timeout:g} seconds"
    elif status != "failed":
        error = None if status == "ended" else "the sandbox was killed"
    memory_exceeded = (error or "").startswith("MemoryError:")
    return ExecutionResult(error is None, stdout, stderr, error, timed_out, memory_exceeded, active)


def run_sandbox(request: dict, tests: str | None, timeout: float) -> tuple[str, str, str, bool]:
    """(report, stdout, stderr, whether it timed out). Leaves no process, even if interrupted."""
    with (
        suppress(RecursionError),  # from removing the folders of an unsafe program
        tempfile.TemporaryDirectory(prefix="nanochat_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as report,
    ):
        stdin.write(marshal.dumps(request) + marshal.dumps(tests))
        stdin.seek(0)
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", SANDBOX, str(report.fileno()), str(os.getpid())]
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "pass_fds": [report.fileno()]}
        timed_out = False
        with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **streams) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                timed_out = True
                process.terminate()  # the judge kills and collects the program
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_TO_COLLECT)
            finally:
                with suppress(ProcessLookupError, PermissionError):  # none is left, on macOS only a zombie
                    os.killpg(process.pid, signal.SIGKILL)
        for file in (report, stdout, stderr):  # the program may have set flags, such as O_DIRECT, with which reading fails
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_RDWR)
        texts = [os.pread(file.fileno(), MAX_OUTPUT_BYTES, 0).decode(errors="replace") for file in (report, stdout, stderr)]
    return *texts, timed_out
