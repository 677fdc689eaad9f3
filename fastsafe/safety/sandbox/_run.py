"""One test run: a worker and a tester in a sandbox each, and the host that waits for the nonce."""

import ast
import builtins
import os
import secrets
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import IO

from fastsafe.errors import DataError, FastsafeError

from ._bwrap import Limits, check_sandbox, command
from ._inside import READY

MAX_SOURCE_BYTES = 100_000  # it travels as an argument of a command
DETAIL_CHARS = 300
_WAIT_SECONDS = 2  # for the worker's exit status once the tester is done


class Outcome(StrEnum):
    """The outcome of a test run; each but the first is a failure of the code."""

    PASSED = "passed"
    FAILED = "failed"  # an assertion, an exception, a limit, an early end
    TIMED_OUT = "timed_out"  # by processor or by wall clock


@dataclass(frozen=True)
class Trial:
    """One test run with its evidence."""

    outcome: Outcome
    detail: str = ""  # last line of the tests on standard error; "" without one


def run_tests(
    code: str, tests: str, *, allow_code_exec: bool = False, limits: Limits | None = None
) -> Trial:
    """Run a model's code against tests in two sandboxes; the package docstring describes them.

    Args:
        code: Python, untrusted; it can import the standard library alone.
        tests: Assertions in Python that call functions of the code; untrusted, too.
        allow_code_exec: Must be True: no code is run by default.
        limits: None for the defaults of `Limits`.

    Raises:
        UsageError: Code is not allowed to run, or this machine cannot make a sandbox.
        DataError: The tests are not Python, or too long.
        FastsafeError: A sandbox did not start: the code was not run and has not failed.
    """
    check_sandbox(allow_code_exec)
    limits = limits or Limits()
    names = called_names(tests)
    if len(repr(code).encode()) > MAX_SOURCE_BYTES:
        return Trial(Outcome.FAILED, f"the code is longer than {MAX_SOURCE_BYTES} bytes")
    nonce = secrets.token_hex(16)
    with ExitStack() as stack:
        output, errors, worker_errors = (
            stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(3)
        )
        requests, to_worker = _pipe(stack)
        replies, from_worker = _pipe(stack)
        worker_command = command("worker", [code], limits)
        worker = _start(stack, worker_command, requests, from_worker, worker_errors)
        arguments = [nonce, tests, names, to_worker.fileno()]
        tester_command = command("tester", arguments, limits)
        tester = _start(stack, tester_command, replies, output, errors, to_worker.fileno())
        for end in (requests, to_worker, replies, from_worker):
            end.close()  # the host's copies: a reader gets end-of-file once the writer has ended
        try:
            status = tester.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Trial(Outcome.TIMED_OUT, f"{limits.wall_seconds} s by the wall clock")
        written, detail = _content(output), _last_line(errors)
        if not written.startswith(READY):
            reason = _last_line(worker_errors) or detail or f"exit status {status}"
            raise FastsafeError(
                f"sandbox: did not start ({reason}), expected two sandboxes; nothing was run"
            )
        if status == 0 and written.endswith(b"\n" + nonce.encode()):
            return Trial(Outcome.PASSED)
        return Trial(_failure(status, worker), detail)


def called_names(tests: str) -> list[str]:
    """Return the names that tests use but neither define nor import: those of the code.

    Raises:
        DataError: The tests are not Python, or too long.
    """
    if len(repr(tests).encode()) > MAX_SOURCE_BYTES:
        raise DataError(f"sandbox: tests are longer than {MAX_SOURCE_BYTES} bytes; split them")
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"sandbox: tests are not Python ({error}); repair the row") from error
    used: set[str] = set()
    defined = set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return sorted(used - defined)


def _failure(status: int, worker: "subprocess.Popen[bytes]") -> Outcome:
    """Return TIMED_OUT where the limit on processor time ended either program, else FAILED."""
    try:
        statuses = {status, worker.wait(_WAIT_SECONDS)}
    except subprocess.TimeoutExpired:
        statuses = {status}
    return Outcome.TIMED_OUT if 128 + signal.SIGXCPU in statuses else Outcome.FAILED


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return (
        stack.enter_context(open(read, "rb", buffering=0)),
        stack.enter_context(open(write, "wb", buffering=0)),
    )


def _start(
    stack: ExitStack,
    arguments: list[str],
    stdin: IO[bytes],
    stdout: IO[bytes],
    stderr: IO[bytes],
    *passed: int,
) -> "subprocess.Popen[bytes]":
    """Start a sandbox, which is killed with all its processes when the stack closes."""
    process = subprocess.Popen(
        arguments, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=passed
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def _content(file: IO[bytes]) -> bytes:
    """Return the content of a file, which the limit on file sizes keeps small."""
    file.seek(0)
    return file.read()


def _last_line(file: IO[bytes]) -> str:
    lines = _content(file).decode(errors="replace").strip().splitlines()
    return lines[-1][-DETAIL_CHARS:] if lines else ""
