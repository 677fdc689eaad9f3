"""Hash a data file."""

import hashlib
from pathlib import Path

from fastsafe.errors import DataError


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
