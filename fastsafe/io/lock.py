"""Lock of an output directory: one process at a time, released by the kernel when it dies."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsafe.errors import StoreError
from fastsafe.io import atomic

NAME = "lock"


@contextmanager
def exclusive(folder: Path, *, label: str = "run", name: str = NAME) -> Iterator[None]:
    """Hold a run directory, or another one, for this process.

    The kernel releases the lock when the process ends, however it ends, so another process can
    resume a killed run at once. The file's content serves the error message alone.

    Args:
        folder: The directory.
        label: What it is, in errors.
        name: Name of the lock's file in it.

    Raises:
        StoreError: Another process holds it, or the folder cannot be written.
    """
    path = folder / name
    handle = _acquire(path, f"{label} {folder}")
    try:
        os.ftruncate(handle, 0)
        holder = {"pid": os.getpid(), "host": platform.node()}
        os.write(handle, json.dumps(holder).encode())
        yield
    finally:
        # removed while held: a process that has it open sees that it is no longer the lock
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, label: str) -> int:
    # no link is followed: its target would be emptied
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            atomic.check_file(path)
            handle = os.open(path, flags, 0o644)
        except OSError as error:
            reason = f"{path.name}: {error.strerror}"
            raise StoreError(f"{label}: cannot be written: {reason}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            raise StoreError(
                f"{label}: is in use by {holder}; wait for it, or use another --out"
            ) from error
        except OSError as error:
            os.close(handle)
            raise StoreError(f"{label}: cannot be locked: {error.strerror}") from error
        if _is_current(handle, path):
            return handle
        os.close(handle)


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(holder['pid'])} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
