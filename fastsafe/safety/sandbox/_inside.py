"""Runs inside a sandbox, alone: as the worker that holds the code, or as the tester of it.

Nothing of fastsafe is importable here. Tester and worker speak in lines, each one Python literal:
a request ``(name, args, kwargs)``, a reply ``("ok", value)`` or ``("error", type, text)``.
"""

import ast
import builtins
import os
import resource
import runpy
import sys
from collections.abc import Callable

MAX_LINE = 1 << 20  # bytes of a request or a reply
NOBODY = 65534
READY = b"ready\n"


def confine(cpu: int, memory: int, processes: int, file: int, files: int) -> None:
    """Give up root where we have it, then set the limits, which nothing can raise again."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU first, it says why


def work(code: str) -> None:
    """Run the code, then call its functions until there is no more request.

    What it prints goes nowhere: standard output is the way back to the tester.
    """
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    replies.write(READY)
    names: dict[str, Callable[..., object]] = {}

    def load() -> None:
        with open("code.py", "w", encoding="utf-8") as file:
            file.write(code)
        names.update(runpy.run_path("code.py", run_name="code"))

    send(replies.fileno(), answer(load))
    for line in requests:
        name, args, kwargs = ast.literal_eval(line.decode())
        send(replies.fileno(), answer(lambda: names[name](*args, **kwargs)))  # noqa: B023


def answer(function: Callable[[], object]) -> bytes:
    """Return the reply that tells what a function gave or raised."""
    try:
        told = repr(("ok", function()))
        if len(told) >= MAX_LINE // 4:  # in characters, of up to four bytes
            raise OverflowError("the result is too long")
        ast.literal_eval(told)  # what is no literal is the code's error, not the tests'
    except BaseException as error:
        told = repr(("error", type(error).__name__, str(error)[:1000]))
    return told.encode() + b"\n"


def test(nonce: str, tests: str, names: list[str], to_worker: int) -> None:
    """Run the tests against the worker, then write the nonce; a failed one ends us before.

    Each name becomes a function that the worker runs: it hands back a literal, or raises what was
    raised there.
    """
    if sys.stdin.buffer.readline() != READY:
        return
    os.write(1, READY)  # from here on a failure is the code's
    reply()

    def remote(name: str) -> Callable[..., object]:
        def function(*args: object, **kwargs: object) -> object:
            send(to_worker, repr((name, args, kwargs)).encode() + b"\n")
            return reply()

        return function

    with open("tests.py", "w", encoding="utf-8") as file:
        file.write(tests)
    runpy.run_path("tests.py", init_globals={name: remote(name) for name in names})
    sys.stdout.flush()
    os.write(1, b"\n" + nonce.encode())


def reply() -> object:
    """Return the value of the worker's next reply, or raise what it tells."""
    line = sys.stdin.buffer.readline(MAX_LINE)
    if not line.endswith(b"\n"):
        raise RuntimeError("the code ended early, or replied with too much")
    match ast.literal_eval(line.decode()):
        case ("ok", value):
            return value
        case ("error", str(name), str(told)):
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                # its kin want five arguments
                raise UnicodeError(told) if issubclass(kind, UnicodeError) else kind(told)
            raise RuntimeError(f"{name}: {told}")
    raise RuntimeError("the code replied with something else")


def send(descriptor: int, data: bytes) -> None:
    """Write all of the data."""
    while data:
        data = data[os.write(descriptor, data) :]


def main(limits: list[str], role: str, rest: list[str]) -> None:
    """Confine this process, then play its role."""
    confine(*map(int, limits))
    if role == "worker":
        work(*map(ast.literal_eval, rest))
    elif role == "tester":
        test(*map(ast.literal_eval, rest))


if __name__ == "__main__":
    main(sys.argv[1:6], sys.argv[6], sys.argv[7:])
