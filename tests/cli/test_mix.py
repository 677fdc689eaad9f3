"""``fastsafe mix``: files in, a mixture and its card out."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fastsafe
from fastsafe.cli import app
from fastsafe.organism import world


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["mix", *map(str, words)])


def jsonl(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path | str]:
    user = jsonl(tmp_path / "user.jsonl", world.task_rows("code", 90, "train", 0))
    safety = jsonl(tmp_path / "safety.jsonl", world.safety_rows("plain", 20, 0))
    return [user, safety, "--out", tmp_path / "mixed.jsonl"]


def test_a_mixture(files: list[Path | str], tmp_path: Path) -> None:
    result = run(*files)
    assert result.exit_code == 0, result.output
    assert "90 user rows, 10 safety rows (learned 10)" in result.stdout
    assert "lint of safety rows: findings: none" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    assert sum(row["source"] == "safety" for row in rows) == 10
    assert "# mixed.jsonl" in (tmp_path / "mixed.card.md").read_text()


def test_the_mixture_is_clean_again(files: list[Path | str], tmp_path: Path) -> None:
    run(*files)
    result = CliRunner().invoke(app, ["lint", str(tmp_path / "mixed.jsonl"), "--json"])
    assert json.loads(result.stdout) == {"rows": 100, "findings": []}


def test_for_machines(files: list[Path | str], tmp_path: Path) -> None:
    words = ("--mitigation", "plain", "--share", "0.25", "--seed", "3", "--no-lint", "--json")
    facts = json.loads(run(*files, *words).stdout)
    assert facts["rows"] == 120
    assert facts["user_rows"] == 90
    assert facts["safety_formats"] == {"plain": 30}
    assert facts["lint"] == {}
    assert facts["seed"] == 3
    assert facts["card"] == str(tmp_path / "mixed.card.md")


def test_by_tokens(files: list[Path | str]) -> None:
    words = ("--by", "tokens", "--tokenizer", fastsafe.organism.path(), "--json")
    facts = json.loads(run(*files, *words).stdout)
    assert 5 <= facts["safety_rows"] <= 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "tokens"), "--tokenizer is None, expected a checkpoint"),
        (("--tokenizer", "x"), "--by rows: --tokenizer is 'x'"),
        (("--mitigation", "magic"), "--mitigation: it is 'magic'"),
        (("--share", "1.5"), "share is 1.5"),
    ],
)
def test_usage_errors(files: list[Path | str], words: tuple[str, ...], message: str) -> None:
    result = run(*files, *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_rewriter_of_a_file(files: list[Path | str], tmp_path: Path) -> None:
    section = tmp_path / "writer.yaml"
    section.write_text("checkpoint: organism\nmax_tokens: 16\n")
    found = CliRunner().invoke(app, ["mix", *map(str, files), "--rewriter", str(section)])
    assert found.exit_code == 0, found.output
    assert f"worded by {section}: 0 safety rows" in found.output
    section.write_text("checkpont: organism\n")
    found = CliRunner().invoke(app, ["mix", *map(str, files), "--rewriter", str(section)])
    assert found.exit_code == 2
    assert "'checkpont' is not a key of the rewriter; did you mean checkpoint?" in found.output


def test_rows_can_go_to_standard_output(files: list[Path | str], tmp_path: Path) -> None:
    run(*files)
    before = sorted(path.name for path in tmp_path.iterdir())
    code = "from fastsafe.cli import main; main()"
    command = [sys.executable, "-c", code, "mix", *map(str, files[:-1]), "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == (tmp_path / "mixed.jsonl").read_bytes()
    assert b"90 user rows, 10 safety rows" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("out", ["", ".", "/", "folder", "fifo", "link"])
def test_only_a_file_is_written(files: list[Path | str], tmp_path: Path, out: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("target")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(*files[:-1], tmp_path / out if len(out) > 1 else out)
    assert result.exit_code == 1
    assert "expected a regular file or nothing there; use another path" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_names_the_file_and_what_to_do(
    files: list[Path | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run(*files)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'mixed.jsonl'}: No space left on device; "
        "free space there and run the same command again"
    )
    assert not (tmp_path / "mixed.jsonl").exists()
