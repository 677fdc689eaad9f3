"""Options are the same idea in every command, and variables; what is misspelt is named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fastsafe.audit import run as audit_run
from fastsafe.cli import EXIT_CODES, app
from fastsafe.cli.command import OWN_VARIABLES
from fastsafe.commands import generate, lint
from fastsafe.engine import SamplingParams
from fastsafe.errors import DataError
from fastsafe_testing import fake_model as fake

# the same idea, whose help says what it does for the command
SAME = {"seed", "dtype", "share", "show_completions", "map", "tokenizer"}
FASTSAFE = str(Path(sys.executable).with_name("fastsafe"))


def run(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(app, words, env=environment)


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for parameter in command.params if path else ():
        if parameter.param_type_name == "option" and parameter.name != "help":
            yield path, parameter
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*path, name))


def test_every_option_is_a_variable_of_its_name() -> None:
    found = list(options(typer.main.get_command(app)))
    assert {path for path, _ in found} >= {("audit",), ("generate",), ("organism", "build")}
    for path, option in found:
        word = max(option.opts, key=len).removeprefix("--")
        own = f"{path[-1]}_" if word in OWN_VARIABLES else ""
        assert option.envvar == f"FASTSAFE_{own}{word}".replace("-", "_").upper()
        if option.multiple:
            assert "in the variable, separate" in option.help


def test_a_variable_of_several_commands_means_one_thing() -> None:
    helps: dict[str, set[str]] = {}
    for _, option in options(typer.main.get_command(app)):
        helps.setdefault(option.envvar, set()).add(option.help)
    several = {name for name, texts in helps.items() if len(texts) > 1}
    assert several <= {f"FASTSAFE_{word.upper()}" for word in SAME}


def test_variables_of_other_commands_are_left_alone(tmp_path: Path) -> None:
    """One that is exported for audits must not become the file of another command."""
    words = ("generate", "organism", "the car", "--max-tokens", "1")
    result = run(*words, FASTSAFE_OUT="runs/first", FASTSAFE_AUDIT_OUT="runs/first")
    assert result.exit_code == 0
    (warning, *_) = result.stderr.splitlines()
    expected = "FASTSAFE_OUT sets no option; did you mean FASTSAFE_GENERATE_OUT?"
    assert warning == f"warning: {expected}"


def test_misspelt_variables_are_named() -> None:
    result = run("list", "recipes", FASTSAFE_MODLE="x", FASTSAFE_JUDGE_KEY="of an endpoint")
    (warning,) = result.stderr.splitlines()
    assert warning == "warning: FASTSAFE_MODLE sets no option; did you mean FASTSAFE_MODEL?"
    assert run("list", "recipes", "--quiet", FASTSAFE_MODLE="x").stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("audit", "organism", "--model", "a", "-m", "b"), "--model is given twice"),
        (("generate", "organism", "x", "--dtype", "flot32"), "Did you mean float32?"),
        (("train", "organism", "x", "--schedule", "cosin"), "Did you mean cosine?"),
        (("list", "recipes", "-q", "-v"), "--quiet and --verbose: both are given"),
        (("audit", "organism", "--device", "mps"), "Apple GPU, which fastsafe has no kernels for"),
        (("audit", "organism", "--device", "gpu"), "expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (("audit", "organism", "--limit", "0"), "it is '0', expected at least 1"),
        (("train", "organism", "x", "--limit", "a"), "it is 'a', expected a valid integer"),
        (("train", "organism", "x", "--alpha", "a"), "it is 'a', expected a valid number"),
        (("generate", "organism", "x", "--top-p", "2"), "it is '2', expected at most 1"),
        (("generate", "organism", "a.jsonl", "b.csv"), "'a.jsonl' is one of 2, expected one file"),
        (("generate", "organism", "a", "-"), "'-' is one of 2, expected one file"),
        (("generate", "organism", ""), "a prompt is empty"),
    ],
)
def test_wrong_options_say_what_is_wrong(words: tuple[str, ...], expected: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not any(words in result.stderr for words in ("Value error", "Input should", "unable to"))


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "none.yaml"),
        ("audit", "organism", "--model", "none"),
        ("report", "none"),
        ("judge", "none"),
        ("generate", "none", "text"),
        ("generate", "organism", "none.jsonl"),
        ("generate", "organism", "x", "--adapter", "none"),
        ("train", "organism", "none.jsonl"),
        ("train", "none", "none.jsonl"),
        ("mix", "none.jsonl", "none.jsonl", "--out", "m.jsonl"),
        ("lint", "none.jsonl"),
        ("verify", "none"),
        ("inspect", "none"),
    ],
    ids=" ".join,
)
def test_a_path_that_is_not_there_is_wrong_usage(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "none" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_checks_exit_with_1_for_what_they_find_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    assert run("lint", str(tmp_path / "bad.jsonl")).exit_code == 2
    assert run("inspect", str(tmp_path)).exit_code == 1, "a folder that holds no checkpoint"


def test_the_table_of_exit_codes_is_in_the_help() -> None:
    assert " ".join(EXIT_CODES.split()) in " ".join(run("--help").stdout.split())


def test_help_cuts_no_sentence() -> None:
    assert "..." not in run("--help").stdout.partition("Commands:")[2]
    assert run("-V").stdout == run("--version").stdout


def test_errors_are_json_where_results_are() -> None:
    for words in (
        ["list", "--json"],
        ["list", "a", "--jso", "--json"],
        ["lint", "a", "b", "--json"],
    ):
        result = run(*words)
        assert (result.exit_code, json.loads(result.stderr)["exit_code"]) == (2, 2)
    result = run("generate", "organism", "x", "--max-tokens=0", "--json")
    assert "it is '0', expected at least 1" in json.loads(result.stderr)["error"]
    result = run("inspect", "none", "--json")
    assert result.stdout == ""
    assert json.loads(result.stderr)["exit_code"] == result.exit_code == 2


def test_quiet_and_verbose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "the car"}\n')
    words = ("generate", "organism", "p.jsonl", "--max-tokens", "1", "--out")
    assert "generate: 1/1 prompts" in run(*words, "a").stderr
    assert run(*words, "b", "-q").stderr == ""
    said = run(*words, "c", "-v").stderr
    assert "loaded " in said
    assert "generate: 1/1 prompts" in said


def test_completion_is_offered() -> None:
    for shell, word in (("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")):
        environment = {**os.environ, "_FASTSAFE_COMPLETE": f"source_{shell}"}
        script = subprocess.run([FASTSAFE], env=environment, capture_output=True, text=True)
        assert word in script.stdout
    asked = {"_FASTSAFE_COMPLETE": "complete_bash", "COMP_WORDS": "fastsafe audit m"}
    done = subprocess.run(
        [FASTSAFE], env={**os.environ, **asked, "COMP_CWORD": "2"}, capture_output=True, text=True
    )
    assert "mitigation-sweep" in done.stdout.split()


@pytest.mark.parametrize("command", ["list mitigations", "report run"])
def test_a_reader_that_leaves_ends_the_command_quietly(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if command == "report run":
        fake.small_run(tmp_path / "run")
    script = f"{FASTSAFE} {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where the pipe took all before its reader left


def test_a_reader_of_a_table_may_leave(tmp_path: Path) -> None:
    """Tables are printed by another library, which has an exit code of its own for this."""
    small = ["--limit=2", "--set=training.max_steps=1", "--set=tasks=code", "--set=formats=plain"]
    made = run("audit", "organism", "--set=training.rows=16", *small, "--out", str(tmp_path / "a"))
    assert made.exit_code == 0, made.output
    reader, writer = os.pipe()
    os.close(reader)
    words = [FASTSAFE, "report", str(tmp_path / "a")]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_unfinished_run_is_told_to_go_on_and_not_to_lower_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit_run, "generate", stop)
    small = ["--limit=2", "--set=training.max_steps=1", "--set=tasks=code", "--set=formats=plain"]
    assert run("audit", "organism", *small, "--out", str(tmp_path / "a")).exit_code == 130
    result = run("report", str(tmp_path / "a"))
    assert result.exit_code == 3
    assert result.stderr.endswith("expected 0.950; finish it with fastsafe audit\n")
    judged = run("judge", str(tmp_path / "a"), "--json")
    assert judged.exit_code == json.loads(judged.stderr)["exit_code"] == 3
    assert json.loads(judged.stdout.splitlines()[-1]) == {
        **{"event": "run_finished", "results": str(tmp_path / "a" / "results.json")},
        "covered": False,
    }


def test_a_terminal_without_unicode_shows_arrows() -> None:
    code = (
        "import sys; sys.argv = ['fastsafe', '-V']\n"
        "from fastsafe.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print('\\N{UPWARDS ARROW}\\N{DOWNWARDS ARROW}\\N{SNOWMAN}')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.split()[-1] == b"^v?"


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
