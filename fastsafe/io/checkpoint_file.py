"""One file of a checkpoint's folder: absent, readable, or wrong; never one taken for another.

An entry that is there but cannot be read (a link to nothing, a FIFO, a device, a folder) is an
error: a half-deleted cache must not look like a checkpoint without a chat template. Links are
followed wherever they lead, since the hub's cache stores every file as a link to its blobs.
"""

import os
from pathlib import Path

import fastsafe._native as _native
from fastsafe.errors import CheckpointError


def open_file(path: Path | str) -> _native.File | None:
    """Open a file of a checkpoint.

    Args:
        path: A regular file, or a symbolic link to one.

    Returns:
        The open file, or None if the folder has no entry of that name.

    Raises:
        CheckpointError: The entry is a link to nothing, a FIFO, a device or a folder, or cannot be
            opened.
    """
    try:
        return _native.File(os.fsencode(path))
    except _native.Error as error:
        reason = str(error)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):  # a folder without access, a NUL in the name
        pass
    if os.path.islink(path) and not os.path.exists(path):
        target = ascii(os.readlink(path))[:200]
        reason = (
            f"file is a link to {target}, which does not exist, expected a file; "
            "download the checkpoint again"
        )
    raise CheckpointError(f"{path}: {reason}")


def read_file(path: Path | str, max_bytes: int) -> bytes | None:
    """Read a small file of a checkpoint; the size is checked before anything is read.

    Returns:
        The content, or None if the folder has no entry of that name.

    Raises:
        CheckpointError: As ``open_file``, or the file is larger than ``max_bytes`` or is changed or
            truncated by another process meanwhile.
    """
    file = open_file(path)
    if file is None:
        return None
    if file.size > max_bytes:
        raise CheckpointError(
            f"{path}: file has {file.size} bytes, expected at most {max_bytes}; use the file that "
            "the model's authors publish"
        )
    try:
        return file.read_bytes(0, file.size)
    except _native.Error as error:
        raise CheckpointError(f"{path}: {error}") from None
