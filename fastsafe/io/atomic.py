"""Atomic writes: temporary name, fsync, rename, fsync of the folder.

A process that dies half-way leaves at most an entry named ``.tmp-*`` beside the target. A rename
replaces whatever has the name, a device too, so only a regular file is replaced by a file, and only
a folder by a folder. A stream, such as standard output, has no name to replace: ``stream_of`` finds
its descriptor, to be written through.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".tmp-"
_STREAMS = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/([0-9]{1,9})")


def stream_of(path: Path | str) -> int | None:
    """Return the descriptor that a path names, None for the path of a file.

    ``-`` and ``/dev/stdout`` are standard output, ``/dev/stderr`` is standard error, ``/dev/fd/N``
    and ``/proc/self/fd/N`` are descriptor N. It need not be open.
    """
    found = _DESCRIPTOR.fullmatch(str(path))
    return int(found[1]) if found else _STREAMS.get(str(path))


def write_through(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` to an open descriptor, which stays open.

    Raises:
        OSError: It is closed, its reader has gone, or it is full.
    """
    while data:
        data = data[os.write(descriptor, data) :]


def check_file(path: Path | str) -> None:
    """Check that ``path`` can be written as a file: a regular file is there, or nothing.

    Raises:
        OSError: It is a link, device, FIFO, socket or directory.
    """
    _check_kind(Path(path), stat.S_IFREG, "a regular file")


def check_folder(path: Path | str) -> None:
    """Check that ``path`` can be written as a folder: a folder is there, or nothing.

    Raises:
        OSError: It is a file, link, device, FIFO or socket.
    """
    _check_kind(Path(path), stat.S_IFDIR, "a folder")


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing a file that is there.

    Raises:
        OSError: The folder is missing, not writable or full; ``path`` is then unchanged.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, newlines as they are; otherwise as ``write_bytes``."""
    write_bytes(path, text.encode())


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path; the file that the caller writes there becomes ``path`` on success.

    Raises:
        OSError: ``path`` is a link, device, FIFO, socket or directory, or the file cannot be
            synced or renamed. On any error ``path`` is unchanged.
    """
    path = Path(path)
    check_file(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        _name(error, temporary, path)
        with suppress(OSError):  # where nothing could be written, nothing can be removed
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def publish_dir(path: Path | str) -> Iterator[Path]:
    """Yield a new empty directory that becomes ``path`` on success and is removed on error.

    An older directory is replaced. POSIX cannot swap one that is not empty, so a crash between
    the two renames leaves ``path`` absent and its old content as ``.tmp-*``: absent or complete,
    never partial.

    Raises:
        OSError: ``path`` is something else than a directory, or the new one cannot be made, synced
            or renamed. On any error ``path`` is unchanged.
    """
    path = Path(path)
    check_folder(path)
    temporary, old = _temporary(path), _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if os.path.lexists(path):
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if os.path.lexists(old):
                old.rename(path)
            raise
    except BaseException as error:
        _name(error, temporary, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)
    _remove(old)


def remove_leftovers(folder: Path | str) -> None:
    """Remove the leftovers of interrupted writes in ``folder``, to which nobody may be writing."""
    for entry in Path(folder).glob(f"{PREFIX}*"):
        _remove(entry)


def _check_kind(path: Path, kind: int, expected: str) -> None:
    try:
        found = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if found != kind:
        kinds = {
            stat.S_IFREG: "a file",
            stat.S_IFDIR: "a directory",
            stat.S_IFLNK: "a symbolic link",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFSOCK: "a socket",
        }
        name = kinds.get(found, "a device")
        reason = f"is {name}, expected {expected} or nothing there; use another path"
        raise OSError(errno.EINVAL, reason, str(path))


def _name(error: BaseException, temporary: Path, path: Path) -> None:
    """Name the path that the caller gave in an error: a full disk names none."""
    if isinstance(error, OSError) and error.errno is not None:
        named = str(error.filename or temporary)
        if named.startswith(str(temporary)):
            error.filename = f"{path}{named.removeprefix(str(temporary))}"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{PREFIX}{path.name[:200]}-{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
