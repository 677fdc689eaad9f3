"""The hash of a file that cannot be read."""

from pathlib import Path

import pytest

from fastsafe.data.tables import file_sha256
from fastsafe.errors import DataError


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: .*\(No such file or directory\)"):
        file_sha256(tmp_path / "none.csv")
