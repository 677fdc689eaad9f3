"""``fastsafe lint``: find flaws in a data set before a model is trained on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastsafe.cli.options import AsJson, echo

if TYPE_CHECKING:
    from fastsafe.safety.lint import Report

EXIT_FINDINGS = 1
MAX_SHOWN = 20  # printed findings per rule; --json prints all

SetKind = Literal["auto", "safety", "user"]


def lint(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows: .jsonl, .json, .csv, .tsv or .parquet.")
    ],
    kind: Annotated[
        SetKind,
        typer.Option(
            help="Whether rows should refuse (safety) or answer (user); a row's columns 'expected' "
            "and 'source' take precedence. auto: safety if at least half of the answers open with "
            "a refusal."
        ),
    ] = "auto",
    probes: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Probes that no row may hold: behaviours, rows, or a .txt with one per line.",
        ),
    ] = None,
    task_format: Annotated[
        str, typer.Option("--format", help="Task format of rows that name none.")
    ] = "",
    language: Annotated[
        str, typer.Option("--lang", help="Language of the answers: en, fr, de or es.")
    ] = "",
    licence: Annotated[str, typer.Option("--licence", help="Licence of rows that name none.")] = "",
    column_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="ROLE=KEY,...", help="Columns that rows are made of; as in train."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="Checkpoint; text that its vocabulary lacks is counted."
        ),
    ] = None,
    is_text_shown: Annotated[
        bool,
        typer.Option(
            "--show-completions", "--show-text", help="Quote the text that each finding is about."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for flaws in fine-tuning or safety data.

    Exit codes: 0 no findings, 1 findings, 2 any error.
    """
    from fastsafe.commands import lint
    from fastsafe.data.shapes import parse_mapping
    from fastsafe.safety.lint import Declared

    report = lint.lint_file(
        file,
        kind=kind,
        probes=probes or (),
        declared=Declared(format=task_format, language=language, licence=licence),
        mapping=parse_mapping(column_map) if column_map else None,
        tokenizer=tokenizer,
    )
    if as_json:
        import json

        typer.echo(json.dumps(report.record()))
    else:
        _print(report, is_text_shown)
    if report.findings:
        raise typer.Exit(EXIT_FINDINGS)


def _print(report: "Report", is_text_shown: bool) -> None:
    shown: dict[str, int] = {}
    for finding in report.findings:
        shown[finding.rule] = shown.get(finding.rule, 0) + 1
        if shown[finding.rule] > MAX_SHOWN:
            continue
        text = " ".join(finding.quote.split())[:200] if is_text_shown else ""
        quote = f": {text!r}" if text else ""
        echo(f"row {finding.row}: {finding.rule}: {finding.detail}{quote}")
    for rule, n in report.rules.items():
        if n > MAX_SHOWN:
            echo(f"{rule}: {n - MAX_SHOWN:,} more; --json lists all")
    for note in report.notes:
        echo(f"note: {note}")
    num_user = report.num_rows - report.num_safety
    counts = ", ".join(f"{rule} {n:,}" for rule, n in report.rules.items()) or "none"
    echo(
        f"{report.num_rows:,} rows ({report.num_safety:,} safety, {num_user:,} user); "
        f"findings: {counts}"
    )
