"""Every option of every command is a variable, too, and repeatable ones keep their spaces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastsafe.cli import app
from fastsafe.commands import generate, lint
from fastsafe.engine import SamplingParams
from fastsafe.errors import DataError

# of --batch-size another one: rows of a training step are not rows of a batch of answers
OTHERS = {("train", "--batch-size"): "FASTSAFE_TRAIN_BATCH_SIZE"}


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name not in ("help", "version"):
            yield path, parameter
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*path, name))


def test_every_option_is_a_variable_of_its_name() -> None:
    found = list(options(typer.main.get_command(app)))
    assert {path for path, _ in found} >= {("audit",), ("generate",), ("organism", "build")}
    for path, option in found:
        word = max(option.opts, key=len)
        name = "FASTSAFE_" + word.removeprefix("--").replace("-", "_").upper()
        assert option.envvar == OTHERS.get((path[-1], word), name), (path, word)
        if option.multiple:
            assert "in the variable, separate" in option.help


def test_repeatable_options_are_split_at_semicolons_and_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def prompts(path: Path, adapters: dict[str, Path]) -> None:
        asked["adapters"] = adapters

    def params(**settings: Any) -> None:
        asked.update(settings)
        raise DataError("enough")

    monkeypatch.setattr(generate, "PromptFile", prompts)
    monkeypatch.setattr("fastsafe.engine.SamplingParams", params)
    words = ["generate", "organism", "p.jsonl", "--out", "o.jsonl"]
    environment = {"FASTSAFE_ADAPTER": "a=/x y/z; b=/w", "FASTSAFE_STOP": " the;\na b"}
    result = CliRunner().invoke(app, words, env=environment)
    assert "enough" in result.stderr
    assert asked["adapters"] == {"a": Path("/x y/z"), "b": Path("/w")}
    assert asked["stop"] == (" the", "a b"), "what stands between is part of the text"
    # an option wins over its variable and is taken as it is
    CliRunner().invoke(app, [*words, "--stop", "x;y"], env=environment)
    assert asked["stop"] == ("x;y",)
    assert SamplingParams().stop_texts == ()


def test_paths_may_hold_colons_and_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def lint_file(*_: Any, probes: Any, **__: Any) -> None:
        found.extend(probes)
        raise DataError("enough")

    monkeypatch.setattr(lint, "lint_file", lint_file)
    CliRunner().invoke(app, ["lint", "f"], env={"FASTSAFE_PROBES": "/a b:c;/d"})
    assert found == [Path("/a b:c"), Path("/d")]
