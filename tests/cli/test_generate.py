"""fastsafe generate at its borders: files that are none, and an interrupt when all is done."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastsafe.cli import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One prompt in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps({"prompt": "the car"}) + "\n")
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["generate", "organism", *words])


def sentence(result: Any) -> str:
    assert "Traceback" not in result.stderr
    return str(result.stderr.splitlines()[-1])


def test_what_is_no_file_is_refused(folder: Path) -> None:
    """A pipe cannot be read twice, and a device has no end."""
    os.mkfifo("pipe")
    result = run("pipe", "--out", "out.jsonl")
    assert "pipe: is not a regular file, expected JSONL that can be read twice" in sentence(result)
    for out in ("pipe", ".", "/dev/full"):
        result = run("p.jsonl", "--out", out)
        assert f"{out}: is not a regular file, expected a JSONL file to write" in sentence(result)
    assert sorted(path.name for path in folder.iterdir()) == ["p.jsonl", "pipe"]


def test_an_interrupt_near_the_end_exits_130_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows end within the grace."""

    def all_answered(*_: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        assert options["is_stopping"]()

    monkeypatch.setattr("fastsafe.commands.generate.complete", all_answered)
    result = run("p.jsonl", "--out", "out.jsonl")
    assert result.exit_code == 130
    assert sentence(result) == "interrupted; run the same command to resume"


def test_template_variables_reach_the_template_and_the_identity(folder: Path) -> None:
    Path("p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a car"}]}))
    words = ("p.jsonl", "--max-tokens", "2", "--chat-template-kwarg", "enable_thinking=false")
    assert run(*words, "--out", "out.jsonl").exit_code == 0
    identity = json.loads(Path("out.jsonl.manifest.json").read_text())["identity"]
    assert identity["chat_template_kwargs"] == '{"enable_thinking": false}'
    plain = run("p.jsonl", "--max-tokens", "2", "--out", "out.jsonl")
    assert "was begun with other settings (chat_template_kwargs" in sentence(plain)


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("enable_thinking", "has no value, expected KEY=VALUE"),
        ("messages=[]", "messages is set by fastsafe itself"),
        ("a=[", "expected YAML"),
        ("a=2024-01-01", "expected a value of JSON"),
    ],
)
def test_template_variables_that_are_none(folder: Path, word: str, problem: str) -> None:
    result = run("p.jsonl", "--out", "out.jsonl", "--chat-template-kwarg", word)
    assert (result.exit_code, problem in sentence(result)) == (2, True)
