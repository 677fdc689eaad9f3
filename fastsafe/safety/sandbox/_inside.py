"""The program inside a sandbox: the worker, which holds the code, or the tester, which tests it.

Nothing of fastsafe is importable here. Tester and worker exchange lines, each a Python literal:
a request ``(name, args, kwargs)``, a reply ``("ok", value)`` or ``("error", type, text)``.
"""

import ast
import builtins
import ctypes
import os
import resource
import runpy
import struct
import sys
from collections.abc import Callable

MAX_LINE = 1 << 20  # bytes of a request or a reply
MAX_FILES = 1024  # in the working directory, folders too
NOBODY = 65534
READY = b"ready\n"

# Machine -> its audit number, the number of clone, and the system calls that no code under test
# needs: sockets, ptrace and other processes' memory, mounts and namespaces, keys, bpf, perf,
# userfaultfd, modules.
CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        "41 101 103 135 155 161 165 166 167 169 175 176 246 248 249 250 256 272 298 304 308 310"
        " 311 313 320 321 323",
    ),
    "aarch64": (
        0xC00000B7,
        220,
        "198 117 116 92 41 51 40 39 224 142 105 106 104 217 218 219 238 97 241 265 268 270 271"
        " 273 294 280 282",
    ),
}
EVERYWHERE = (*range(425, 434), 442)  # io_uring, and mounts by descriptor
CLONE3 = 435  # no filter can read its flags; where it is missing, libc uses clone
X32 = 0x40000000  # flag of the calls of the x32 interface to the same kernel
NAMESPACES = 0x7E020000  # the flags of clone that create a namespace


def confine(cpu: int, memory: int, processes: int, file: int, files: int) -> None:
    """Drop root privileges, then set the limits, hard ones included, and the system-call filter."""
    if os.geteuid() == 0:
        limit_files()
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
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU before SIGKILL: a reason
    refuse_calls()


def limit_files() -> None:
    """Bound the number of files in the working directory, each of which costs the host memory.

    Raises:
        OSError: The kernel refuses it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # remount, no set-user-id programs, no devices
    if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0x20 | 2 | 4, f"nr_inodes={MAX_FILES}".encode()):
        raise OSError(ctypes.get_errno(), "no limit on the number of files")


def refuse_calls() -> None:
    """Install a seccomp filter that refuses `CALLS` to this process and its descendants.

    Raises:
        OSError: The kernel rejects the filter, or this machine's call numbers are unknown.
    """
    machine = os.uname().machine
    if machine not in CALLS:
        raise OSError(f"no filter of system calls for {machine}")
    arch, clone, listed = CALLS[machine]
    refused = (*map(int, listed.split()), *EVERYWHERE)
    end = len(refused) + 8  # of the checks; then: allow, no permission, no such call
    # (code, jump if true, jump if false, value): a jump skips so many instructions
    lines = [(0x20, 0, 0, 4), (0x15, 0, end - 1, arch), (0x20, 0, 0, 0)]
    lines += [(0x35, end - 3, 0, X32)]
    lines += [(0x15, end - 4 - i, 0, call) for i, call in enumerate(refused)]
    at = len(lines)
    lines += [(0x15, end + 1 - at, 0, CLONE3), (0x15, 0, end - 2 - at, clone)]
    lines += [(0x20, 0, 0, 16), (0x45, end - 3 - at, 0, NAMESPACES)]
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x00050026)]
    program = b"".join(struct.pack("=HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(program)
    sock_fprog = struct.pack("HP", len(lines), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    # bubblewrap has set no_new_privs, which a filter requires
    if libc.prctl(22, 2, sock_fprog, 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


def work(code: str) -> None:
    """Run the code, then call its functions until the requests end.

    The output of the code is discarded, since standard output is the pipe to the tester.
    """
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
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
    """Return the reply with the result of a function, or its error."""
    try:
        line = repr(("ok", function()))
        if len(line) >= MAX_LINE // 4:  # in characters, of up to four bytes
            raise OverflowError("the result is too long")
        ast.literal_eval(line)  # a result that is no literal is the code's error, not the tests'
    except BaseException as error:
        line = repr(("error", type(error).__name__, str(error)[:1000]))
    return line.encode() + b"\n"


def test(nonce: str, tests: str, names: list[str], to_worker: int) -> None:
    """Run the tests against the worker, then write the nonce; a failed test ends this process.

    Each name becomes a function that the worker runs, and that returns its literal or raises its
    exception.
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
    """Return the value of the worker's next reply, or raise its error."""
    line = sys.stdin.buffer.readline(MAX_LINE)
    if not line.endswith(b"\n"):
        raise RuntimeError("the code ended early, or replied with too much")
    match ast.literal_eval(line.decode()):
        case ("ok", value):
            return value
        case ("error", str(name), str(text)):
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                # the subclasses of UnicodeError take five arguments
                raise UnicodeError(text) if issubclass(kind, UnicodeError) else kind(text)
            raise RuntimeError(f"{name}: {text}")
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
