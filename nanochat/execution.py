"""Run Python that a model wrote, in a process of its own, and say how it went.

The idea: the code runs in a fresh interpreter that shares nothing with us but three files we
made for it (its output, its errors, its report), inside an empty folder that is deleted
afterwards, under resource limits, in a process group that is killed when the code is done or
its time is up. `success` means that the code ran to its end, which only the runner around it
can report: printing "passed" is output, and leaving early by `sys.exit(0)` is a failure.

What this does not do: it keeps out mistakes and runaway programs, not an attacker. The code
runs as our user, so it can read what we can read and reach the network, and a child process
that starts a session of its own outlives the group (though not its CPU time).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import BinaryIO

MAX_OUTPUT_BYTES = 1024 * 1024  # kept of each of stdout and stderr
MAX_FILE_BYTES = 16 * 1024 * 1024  # of any file the code writes, its output included

# What the fresh interpreter executes. It reads a secret and the program from stdin, limits itself,
# runs the program as __main__, and writes the secret and the error, if any, into the report file.
# The secret keeps a program that merely finds the open file from reporting for itself.
RUNNER = '''
import os, sys, traceback, types

def limit_resources(cpu_seconds, memory_bytes, file_bytes):
    import resource
    limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_CPU": cpu_seconds, "RLIMIT_FSIZE": file_bytes,
              "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):
            pass  # macOS knows no limit on memory

def describe(error):
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text[:500].encode("utf-8", "backslashreplace")

def main():
    report_fd, *limits = map(int, sys.argv[1:])
    os.set_inheritable(report_fd, False)
    secret, source = sys.stdin.read().split("\\n", 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:] = []
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    limit_resources(*limits)
    failure = None
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        sys.stdout.flush()
    except MemoryError:
        module.__dict__.clear()  # make room for saying so
        failure = MemoryError("more than the program may use")
    except BaseException as error:
        failure = error
        failure.__traceback__ = error.__traceback__.tb_next  # our own frame is of no interest
    os.write(report_fd, secret.encode() + b" " + (describe(failure) if failure is not None else b""))
    if failure is not None:
        traceback.print_exception(type(failure), failure, failure.__traceback__)
        sys.exit(1)

main()
'''


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # the code ran to its end
    stdout: str
    stderr: str
    error: str | None  # why not, in short; None on success
    timeout: bool
    memory_exceeded: bool


def execute_code(
    code: str, timeout: float = 5.0, maximum_memory_bytes: int = 256 * 1024 * 1024
) -> ExecutionResult:
    """Run a Python program and wait for it, at most `timeout` seconds of wall-clock time.

    The memory limit is on address space, for each process that the code starts. Output beyond
    1 MiB is cut. Never raises for anything the code does.

    >>> execute_code("print(6 * 7)").stdout
    '42\\n'
    """
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="nanochat_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as report,
    ):
        stdin.write(f"{secret}\n{code}".encode("utf-8", errors="replace"))
        stdin.seek(0)
        limits = (int(timeout) + 2, maximum_memory_bytes, MAX_FILE_BYTES)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", "-c", RUNNER, str(report.fileno()), *map(str, limits)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(report.fileno(),),
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        timed_out = not finished(process, timeout)
        error = judge(process.returncode, timed_out, timeout, secret, read_text(report))
        return ExecutionResult(
            success=error is None,
            stdout=read_text(stdout),
            stderr=read_text(stderr),
            error=error,
            timeout=timed_out,
            memory_exceeded=error is not None and error.startswith("MemoryError:"),
        )


def finished(process: subprocess.Popen, timeout: float) -> bool:
    """Wait for the process, then kill whatever is left of its group, also when we are interrupted."""
    try:
        process.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # start_new_session made its id the group's
        except (ProcessLookupError, PermissionError):
            pass  # nothing is left (macOS says EPERM where only a zombie is)
        process.wait()


def read_text(file: BinaryIO) -> str:
    """The beginning of a file as text; read by offset, as the process has moved the shared position."""
    return os.pread(file.fileno(), MAX_OUTPUT_BYTES, 0).decode("utf-8", errors="replace")


def judge(exit_code: int, timed_out: bool, timeout: float, secret: str, report: str) -> str | None:
    """Why a finished process failed, in short, or None where its program ran to its end."""
    if timed_out:
        return f"timed out after {timeout:g} seconds"
    said, _, error = report.partition(" ")
    if said != secret:
        return f"killed by signal {-exit_code}" if exit_code < 0 else f"left early with code {exit_code}"
    if not error and exit_code != 0:
        return f"exit code {exit_code} after the end"
    return error or None
