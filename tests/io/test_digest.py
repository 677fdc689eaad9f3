"""Hashes that stores and identities hold: their values must never move."""

from pathlib import Path

import pytest

from fastsafe.errors import DataError
from fastsafe.io.digest import file_sha256, sha256_of


def test_the_hash_of_a_json_value() -> None:
    expected = "141c3b694daf9eb6805ece72ad134234c45b5edf27b5594039b6085212fcb467"
    assert sha256_of({"a": [1, None, "\u00e9"], "b": 0.5}) == expected
    assert sha256_of({"b": 0.5, "a": [1, None, "\u00e9"]}) == expected
    assert sha256_of({"a": ["1", None, "\u00e9"], "b": 0.5}) != expected


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="cannot be read"):
        file_sha256(tmp_path / "absent")
