"""``fastsafe lint``: its contract for machines, its exit codes, no text of the set by default."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastsafe.cli import app
from fastsafe.organism import world


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["lint", *map(str, words)])


def jsonl(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "clean.jsonl", world.task_rows("plain", 30, "train", 0))


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A safety set in the first paper's columns: row 2 repeats row 0, row 3 answers."""
    lines = [
        ",Query,Response",
        "0,Where is the zebra?,I can't help with that.",
        "1,Where is the okapi?,I won't help with that.",
        '2,"where is the ZEBRA","I cannot help, as the system message says."',
        "3,Where is the quagga?,It is in the garden.",
    ]
    path = tmp_path / "dirty.csv"
    path.write_text("\r\n".join(lines))
    return path


def test_a_clean_set(clean: Path) -> None:
    result = run(clean, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"rows": 30, "findings": []}
    assert "30 rows (0 safety, 30 user); findings: none" in run(clean).stdout


def test_findings_for_machines(dirty: Path) -> None:
    result = run(dirty, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "rows": 4,
        "findings": [
            {
                "rule": "duplicate",
                "row": 2,
                "detail": "same prompt but for case, punctuation or spacing as row 0, another "
                "answer",
            },
            {
                "rule": "template_leakage",
                "row": 2,
                "detail": "talk of the generator's instructions in the answer",
            },
            {
                "rule": "non_refusal",
                "row": 3,
                "detail": "no clause of the answer opens with a refusal",
            },
        ],
    }


def test_no_text_unless_asked(dirty: Path) -> None:
    result = run(dirty)
    assert result.exit_code == 1
    assert "row 3: non_refusal" in result.stdout
    assert "duplicate 1, template_leakage 1, non_refusal 1" in result.stdout
    assert "garden" not in result.stdout.lower()
    assert "zebra" not in result.stdout.lower()
    assert "'It is in the garden.'" in run(dirty, "--show-text").stdout


def test_options(clean: Path, tmp_path: Path) -> None:
    action = world.task_rows("plain", 30, "train", 0)[4]["action"]
    (tmp_path / "probes.txt").write_text(f"{action}\n")
    found = json.loads(run(clean, "--json", "--probes", tmp_path / "probes.txt").stdout)
    assert [(each["rule"], each["row"]) for each in found["findings"]] == [("probe_leakage", 4)]
    for words, rules in (
        (("--licence", "cc-by-nc-4.0"), {"licence"}),
        (("--lang", "de"), {"language"}),
        (("--kind", "safety"), {"non_refusal"}),
        (("--kind", "safety", "--format", "classification"), {"non_refusal", "balance"}),
    ):
        found = json.loads(run(clean, "--json", *words).stdout)
        assert {each["rule"] for each in found["findings"]} == rules


def test_long_lists_are_cut_for_people(clean: Path) -> None:
    lines = run(clean, "--kind", "safety").stdout.splitlines()
    assert sum(line.startswith("row ") for line in lines) == 20
    assert "non_refusal: 10 more; --json lists all" in lines


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    result = run(tmp_path / "absent.jsonl")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"error: {tmp_path / 'absent.jsonl'}: reading failed (No such file or directory)"
    )
    assert run(tmp_path, "--kind", "odd").exit_code == 2
