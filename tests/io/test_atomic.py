"""A write is whole or absent, and nothing else is touched."""

import errno
import os
from pathlib import Path

import pytest

from fastsafe.io import atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_bytes_and_text_replace(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    atomic.write_text(str(path), "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["folder", "absent/file"])
def test_errors_name_the_file_that_was_meant(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        atomic.write_text(tmp_path / name, "text")
    assert caught.value.filename == str(tmp_path / name)
    assert names(tmp_path) == ["folder"]


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    """As root a rename would put a file in the place of /dev/null."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    kinds = {"folder": "a directory", "link": "a symbolic link", "fifo": "a FIFO"}
    for name, kind in kinds.items():
        before = os.lstat(tmp_path / name)
        with pytest.raises(OSError, match=f"is {kind}, expected a regular file") as caught:
            atomic.write_text(tmp_path / name, "new")
        assert caught.value.filename == str(tmp_path / name)
        after = os.lstat(tmp_path / name)
        assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert (tmp_path / "target").read_text() == "old"
    assert names(tmp_path) == ["fifo", "folder", "link", "target"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic.write_bytes(tmp_path / "atomic", b"")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "atomic")}
    assert len(modes) == 1, "a shared folder must stay readable for others"


def test_error_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write_half() -> None:
        with atomic.replace_file(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.write_bytes(tmp_path / "absent" / "a", b"")


def test_file_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name[:5]}")
        fsync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_rename)
    atomic.write_bytes(tmp_path / "a", b"x")
    assert steps == ["sync .tmp-", "rename", f"sync {tmp_path.name[:5]}"]


def test_publish_dir(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic.publish_dir(target) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".tmp-")
        (folder / "nested").mkdir()
        (folder / "nested" / "a").write_text("1")
        assert not target.exists(), "it must not be seen before it is complete"
    assert (target / "nested" / "a").read_text() == "1"
    assert names(tmp_path) == ["adapter"]


def test_publish_dir_replaces_an_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "stale").write_text("")
    with atomic.publish_dir(target) as folder:
        (folder / "fresh").write_text("")
    assert names(target) == ["fresh"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_publish_dir_keeps_an_older_folder_if_the_new_one_cannot_have_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("")
    rename = Path.rename

    def fails_for_the_new(path: Path, to: Path) -> Path:
        if (path / "fresh").exists():
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(error), atomic.publish_dir(target) as folder:
        (folder / "fresh").write_text("")
    assert names(tmp_path) == ["adapter"]
    assert names(target) == ["old"]


def test_publish_dir_replaces_nothing_but_a_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "fifo")
    before = names(tmp_path)
    kinds = {"file": "a file", "link": "a symbolic link", "fifo": "a FIFO"}
    for name, kind in kinds.items():
        target = tmp_path / name
        refused = pytest.raises(OSError, match=f"is {kind}, expected a folder or nothing")
        with refused, atomic.publish_dir(target) as folder:
            (folder / "fresh").write_text("")
        assert names(tmp_path) == before
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("path", "descriptor"),
    [
        ("-", 1),
        ("/dev/stdout", 1),
        (Path("/dev/stdout"), 1),
        ("/dev/stderr", 2),
        ("/dev/fd/0", 0),
        ("/proc/self/fd/63", 63),
        ("./-", None),
        ("/dev/null", None),
        ("/dev/fd/", None),
        ("/dev/fd/-1", None),
        ("/dev/fd/1x", None),
        ("/dev/fd/\N{ARABIC-INDIC DIGIT ONE}", None),
        ("", None),
    ],
)
def test_the_paths_of_streams_are_known(path: str | Path, descriptor: int | None) -> None:
    assert atomic.stream_of(path) == descriptor


def test_write_through_writes_all_and_leaves_the_stream_open(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "stream", os.O_WRONLY | os.O_CREAT)
    atomic.write_through(descriptor, b"a" * 100_000)
    atomic.write_through(descriptor, b"b")
    os.close(descriptor)
    assert (tmp_path / "stream").read_bytes() == b"a" * 100_000 + b"b"
    with pytest.raises(OSError, match="Bad file descriptor"):
        atomic.write_through(descriptor, b"c")


def test_a_name_that_no_file_can_have_is_refused_before_anything_is_written() -> None:
    for path in ("", ".", "..", "/"):
        with pytest.raises(OSError, match="is a directory, expected a regular file"):
            atomic.write_text(path, "text")


def test_publish_dir_error_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic.publish_dir(target) as folder:
        (folder / "old").write_text("")

    def write_half() -> None:
        with atomic.publish_dir(target) as folder:
            (folder / "new").write_text("")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_publish_dir_puts_the_old_folder_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("")
    rename = Path.rename

    def fail_once_published(self: Path, to: Path) -> Path:
        if to == target and (self / "new").exists():
            raise OSError("disk full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_once_published)
    with pytest.raises(OSError, match="disk full"), atomic.publish_dir(target) as folder:
        (folder / "new").write_text("")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_remove_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a-1").mkdir()
    (tmp_path / ".tmp-a-1" / "x").write_text("")
    (tmp_path / ".tmp-b-2").write_text("")
    (tmp_path / "kept").write_text("")
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_of_a_full_disk_names_the_path_that_was_meant(tmp_path: Path, kind: str) -> None:
    def write() -> None:
        if kind == "file":
            with atomic.replace_file(tmp_path / "a"):
                raise OSError(errno.ENOSPC, "full")  # write() names no file
        with atomic.publish_dir(tmp_path / "a") as folder:
            raise OSError(errno.ENOSPC, "full", str(folder / "b"))

    with pytest.raises(OSError, match="full") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a") + ("/b" if kind == "folder" else "")
    assert names(tmp_path) == []
