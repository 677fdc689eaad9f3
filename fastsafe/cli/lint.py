"""``fastsafe lint``: flaws of a data set, before anything learns from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastsafe.cli.options import EXIT_ERROR, AsJson, Debug, parted

if TYPE_CHECKING:
    from fastsafe.safety.lint import Report

MAX_SHOWN = 20  # findings of one rule that are printed; --json prints all


SetKind = Literal["auto", "safety", "user"]  # what the rows of a set should do


def lint(
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl, .json, .csv or .parquet.")],
    kind: Annotated[
        SetKind,
        typer.Option(
            help="Whether rows should refuse or answer; a row's own column 'expected' or 'source' "
            "wins. auto: a safety set if at least half of the answers open with a refusal."
        ),
    ] = "auto",
    probes: Annotated[
        list[Path] | None,
        typer.Option(
            callback=parted,
            help="Probes that no row may hold: behaviours, rows, or a .txt with one per line; any "
            "number, in the variable parted by ';'.",
        ),
    ] = None,
    task_format: Annotated[
        str, typer.Option("--format", help="Task format of rows that name none.")
    ] = "",
    language: Annotated[
        str, typer.Option("--lang", help="Language of the answers: en, fr, de or es.")
    ] = "",
    licence: Annotated[str, typer.Option("--licence", help="Licence of rows that name none.")] = "",
    is_text_shown: Annotated[
        bool, typer.Option("--show-text", help="Quote the text that each finding is about.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look for flaws in fine-tuning or safety data; exit code 1 when there are any."""
    from fastsafe.commands import lint
    from fastsafe.safety.lint import Declared

    report = lint.lint_file(
        file,
        kind=kind,
        probes=probes or (),
        declared=Declared(format=task_format, language=language, licence=licence),
    )
    if as_json:
        import json

        typer.echo(json.dumps(report.record()))
    else:
        _print(report, is_text_shown)
    if report.findings:
        raise typer.Exit(EXIT_ERROR)


def _print(report: "Report", is_text_shown: bool) -> None:
    shown: dict[str, int] = {}
    for each in report.findings:
        shown[each.rule] = shown.get(each.rule, 0) + 1
        if shown[each.rule] > MAX_SHOWN:
            continue
        quote = f": {' '.join(each.quote.split())[:200]!r}" if is_text_shown and each.quote else ""
        typer.echo(f"row {each.row}: {each.rule}: {each.detail}{quote}")
    for rule, n in report.rules.items():
        if n > MAX_SHOWN:
            typer.echo(f"{rule}: {n - MAX_SHOWN:,} more; --json lists all")
    for note in report.notes:
        typer.echo(f"note: {note}")
    num_user = report.num_rows - report.num_safety
    found = ", ".join(f"{rule} {n:,}" for rule, n in report.rules.items()) or "none"
    typer.echo(
        f"{report.num_rows:,} rows ({report.num_safety:,} safety, {num_user:,} user); "
        f"findings: {found}"
    )
