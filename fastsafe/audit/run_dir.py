"""The run directory: its files, and errors of the operating system as sentences."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastsafe.audit import manifest
from fastsafe.audit.stages import train
from fastsafe.audit.store import sqlite_store as stores
from fastsafe.errors import FastsafeError, StoreError, os_sentence
from fastsafe.io import lock

RESULTS = "results.json"
REPORT = "report.html"
EXPORTS = "exports"
JUDGES = "judges"  # replies of the rewriter, replies and spending of endpoints

_LOGS = tuple(f"{stores.NAME}-{log}" for log in ("wal", "shm", "journal"))
_FOLDERS = (train.ADAPTERS, EXPORTS, JUDGES)
# the store marks the folder as a run, so it is deleted last; SQLite drops logs without a store
_FILES = (manifest.NAME, RESULTS, REPORT, stores.NAME, *_LOGS)


def store_of(run_dir: Path) -> Path:
    """Return the path of a run's store.

    Raises:
        StoreError: There is none, or an entry of the run is a link to somewhere else.
    """
    _check_links(run_dir)
    path = run_dir / stores.NAME
    if not path.is_file():
        missing = FileNotFoundError(str(path))
        raise StoreError(
            f"run {run_dir}: has no {stores.NAME}, expected a run of fastsafe audit"
        ) from missing
    return path


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Turn an OSError, such as a full or read-only disk, into a StoreError with advice."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FastsafeError):
            raise
        if error.errno == errno.EINVAL:  # something stands where a file or folder of the run goes
            raise StoreError(f"run {run_dir}: {os_sentence(error)}") from error
        raise StoreError(
            f"run {run_dir}: cannot be written: {error.strerror or error}; "
            "free space or permissions there and run the same command to resume"
        ) from error


def is_new(run_dir: Path) -> bool:
    """Return whether there is no run yet; a folder with other content is an error."""
    if not run_dir.exists():
        above = next(folder for folder in run_dir.absolute().parents if folder.exists())
        if not above.is_dir():
            raise StoreError(f"run {run_dir}: Not a directory: {above}; use another --out")
        return True
    if not run_dir.is_dir():
        raise StoreError(f"run {run_dir}: is a file, expected a folder; use another --out")
    _check_links(run_dir)
    if (run_dir / stores.NAME).is_file():
        return False
    if any(entry.name not in (lock.NAME, *_LOGS) for entry in run_dir.iterdir()):
        raise StoreError(
            f"run {run_dir}: is not empty and holds no run; use another --out, or empty it"
        )
    return True


def _check_links(run_dir: Path) -> None:
    """Refuse entries through which a run would write or delete outside of its folder."""
    inside = run_dir.resolve()
    for name in (*_FOLDERS, *_FILES):
        path = run_dir / name
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise StoreError(
                f"run {run_dir}: {name} is a link out of the folder, expected an entry of its own; "
                "remove the link, or use another --out"
            )


def clear(run_dir: Path) -> None:
    """Delete the files that a run writes; killed half-way, the rest is still a resumable run."""
    for name in _FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)
