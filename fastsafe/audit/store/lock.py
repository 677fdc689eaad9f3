"""Lock of a run directory: one process at a time, released by the kernel when it dies."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsafe.errors import StoreError

NAME = "lock"


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process.

    The kernel releases the lock when the process ends, however it ends, so another process can
    resume a killed run at once. The file's content serves the error message alone.

    Raises:
        StoreError: Another process holds the run, or the folder cannot be written.
    """
    path = run_dir / NAME
    handle = _acquire(path)
    try:
        os.ftruncate(handle, 0)
        holder = {"pid": os.getpid(), "host": platform.node()}
        os.write(handle, json.dumps(holder).encode())
        yield
    finally:
        # removed while held: a process that has it open sees that it is no longer the lock
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"run {path.parent}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            raise StoreError(
                f"run {path.parent}: is in use by {holder}; wait for it, or use another --out"
            ) from error
        except OSError as error:
            os.close(handle)
            raise StoreError(f"run {path.parent}: cannot be locked: {error.strerror}") from error
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
