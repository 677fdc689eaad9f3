"""The bubblewrap command of one sandbox, and the check that this machine can run it.

Memory is limited per process, and so in all to that limit times the number of processes. A limit on
the sum needs a control group, which only some machines let their users make.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsafe.errors import UsageError

PROGRAM = Path(__file__).with_name("_inside.py")
SCRATCH_BYTES = 16 << 20  # of the file system in memory that is the working directory
PROBE_SECONDS = 20
NOBODY = "65534"
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN")  # see `_namespaces`
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a test run, which consists of two sandboxes."""

    cpu_seconds: int = 10  # of each process
    wall_seconds: float = 30.0  # of the whole run: ends what sleeps
    memory_bytes: int = 512 << 20  # address space of each process: in all, times `processes`
    processes: int = 16  # of each sandbox's user, threads too
    file_bytes: int = 1 << 20  # largest file, and most output
    open_files: int = 64


def command(role: str, arguments: Sequence[object], limits: Limits) -> list[str]:
    """Return the command that runs a role of `PROGRAM` in a sandbox.

    The sandbox has no network, no process of the host and no environment; its root holds read-only
    system folders, the interpreter and the program, and only its working directory, in memory, is
    writable.

    Args:
        role: ``"worker"``, ``"tester"``, or ``"probe"``, which only confines itself.
        arguments: Literals for the role.
        limits: Set by the program before anything else.
    """
    folders = [path for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)]
    binds = [("--ro-bind", path, path) for path in folders]
    binds += [("--dev-bind", path, path) for path in DEVICES]
    binds += [("--ro-bind", sys.base_prefix, "/python"), ("--ro-bind", str(PROGRAM), "/inside.py")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    numbers = (limits.cpu_seconds, limits.memory_bytes, limits.processes)
    return [
        *("bwrap", *_namespaces(), "--hostname", "sandbox", "--die-with-parent", "--new-session"),
        "--clearenv",
        *("--setenv", "LD_LIBRARY_PATH", "/python/lib", "--perms", "0755", "--dir", "/dev"),
        *(word for bind in binds for word in bind),
        *("--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp", "--"),
        *(f"/python/bin/python{version}", "-I", "-S", "-B", "/inside.py"),
        *map(str, (*numbers, limits.file_bytes, limits.open_files)),
        *(role, *map(repr, arguments)),
    ]


def _namespaces() -> tuple[str, ...]:
    """Return the options that unshare every namespace and run as nobody.

    A host's root becomes nobody inside: the program's first acts are to limit the number of files
    and to change its user, with three capabilities that are lost with it. Mapped to another id in a
    user namespace, it would stay root for the kernel, which does not count the processes of root.
    """
    if os.geteuid() == 0:
        apart = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts")
        capabilities = [word for name in CAPABILITIES for word in ("--cap-add", name)]
        return (*apart, "--unshare-cgroup-try", "--cap-drop", "ALL", *capabilities)
    user = ("--unshare-user", "--disable-userns", "--uid", NOBODY, "--gid", NOBODY)
    return ("--unshare-all", *user, "--cap-drop", "ALL")


def check_sandbox(allow_code_exec: bool) -> None:
    """Check that running code is allowed, and that this machine can make a sandbox.

    Raises:
        UsageError: It is not allowed, or bubblewrap is missing or cannot make a sandbox here.
    """
    if not allow_code_exec:
        raise UsageError(
            "sandbox: allow_code_exec is off, expected --allow-code-exec where a model's code is "
            "to be run; it runs in a bubblewrap sandbox"
        )
    if shutil.which("bwrap") is None:
        raise UsageError(
            "sandbox: bwrap is missing, expected bubblewrap 0.8 or later; install it, "
            "without it no code is run"
        )
    if reason := _probe():
        raise UsageError(
            f"sandbox: bwrap cannot make a sandbox here ({reason}), expected user namespaces; "
            "without them no code is run"
        )


@functools.cache
def _probe() -> str:
    """Return the reason why this machine cannot make a sandbox, "" where it can."""
    try:
        probe = subprocess.run(
            command("probe", [], Limits()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS} s"
    reason = probe.stderr.decode(errors="replace").strip()[-300:]
    return "" if probe.returncode == 0 else reason or f"exit status {probe.returncode}"
