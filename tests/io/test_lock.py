"""One process per run: who holds it is said, and a dead holder holds nothing."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastsafe.errors import StoreError
from fastsafe.io.lock import NAME, exclusive

HOLD = """
import sys
from pathlib import Path
from fastsafe.io.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        with pytest.raises(StoreError) as caught, exclusive(tmp_path):
            pass
        assert f"process {process.pid} on host {platform.node()}" in str(caught.value)
        assert "\n" not in str(caught.value)
        process.kill()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == process.pid
    with exclusive(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_it_is_released_on_errors(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_an_unreadable_note_does_not_matter(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with exclusive(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_two_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(StoreError, match=f"process {os.getpid()}"),
        exclusive(tmp_path),
    ):
        pass


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"), exclusive(tmp_path / "nothing"):
        pass


@pytest.mark.parametrize(("kind", "words"), [("fifo", "a FIFO"), ("folder", "a directory")])
def test_what_is_no_file_is_no_lock(tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / NAME
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    refused = pytest.raises(StoreError, match=f"cannot be written: lock: is {words}, expected")
    with refused, exclusive(tmp_path):
        pass
    assert path.exists()


def test_a_lock_that_is_a_link_empties_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / NAME).symlink_to("target")
    with pytest.raises(StoreError, match="is a symbolic link"), exclusive(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "kept"
