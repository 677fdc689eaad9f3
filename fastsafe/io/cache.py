"""The user's cache folder: what was made once and can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$FASTSAFE_CACHE``, else ``fastsafe`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if folder := os.environ.get("FASTSAFE_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fastsafe"
