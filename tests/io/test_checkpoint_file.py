"""An entry of a checkpoint's folder is absent, readable or wrong."""

import os
from pathlib import Path

import pytest

from fastsafe.errors import CheckpointError
from fastsafe.io.checkpoint_file import open_file, read_file
from fastsafe.io.json_file import read_optional_object


def test_absent_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "absent", tmp_path / "no" / "folder", tmp_path / "file" / "below"):
        assert open_file(path) is None
        assert read_file(path, 10) is None
        assert read_optional_object(path, 10) is None


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    blobs = tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_bytes(b"content")
    (snapshot / "file").symlink_to("../../blobs/0123")
    assert read_file(snapshot / "file", 7) == b"content"


def wrong_entries(folder: Path) -> dict[str, Path]:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "dangling").symlink_to("../blobs/gone\x1b")
    (folder / "loop").symlink_to("loop")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "directory, FIFO or device, expected a regular file"),
        ("fifo", "directory, FIFO or device, expected a regular file"),
        ("device", "directory, FIFO or device, expected a regular file"),
        ("dangling", r"link to '\.\./blobs/gone\\x1b', which does not exist.*download"),
        ("loop", "link to 'loop', which does not exist"),
    ],
)
def test_what_cannot_be_read_is_not_taken_as_absent(
    tmp_path: Path, name: str, message: str
) -> None:
    path = wrong_entries(tmp_path)[name]
    for read in (open_file, lambda p: read_file(p, 10), lambda p: read_optional_object(p, 10)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(CheckpointError, match="1099511627776 bytes, expected at most 10"):
        read_file(tmp_path / "file", 10)
