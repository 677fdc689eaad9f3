"""``fastsafe mix``: safety rows into a user's fine-tuning rows."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastsafe.cli.options import AsJson, Debug
from fastsafe.errors import UsageError

By = Literal["rows", "tokens"]  # what a share is of


def mix(
    user: Annotated[Path, typer.Argument(help="The user's rows: .jsonl, .json, .csv or .parquet.")],
    safety: Annotated[Path, typer.Argument(help="Safety rows, or behaviours by --behaviours.")],
    out: Annotated[Path, typer.Option(help="JSONL to write; its card goes beside it.")],
    mitigation: Annotated[
        str,
        typer.Option(
            help="How safety rows are chosen and dressed; see 'fastsafe list mitigations'."
        ),
    ] = "paraphrase",
    share: Annotated[float, typer.Option(help="Part of the result that is safety rows.")] = 0.1,
    by: Annotated[By, typer.Option(help="What the share is of.")] = "rows",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="Checkpoint folder or hub id whose tokens are counted."
        ),
    ] = None,
    task_format: Annotated[
        str,
        typer.Option(help="Format of the user's rows, for mitigations that need it (task_styled)."),
    ] = "",
    abstain: Annotated[
        bool,
        typer.Option(
            "--abstain", help="Add an option that refuses where the user's rows have options."
        ),
    ] = False,
    rewriter: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|YAML",
            help="Model that words safety requests in the user's style: a checkpoint, or a YAML "
            "file with what a recipe has under 'rewrite'. Rows whose wording does not pass the "
            "lint keep the template's.",
        ),
    ] = None,
    behaviours: Annotated[
        bool,
        typer.Option(
            "--behaviours", help="SAFETY holds behaviours: make refused rows in every format."
        ),
    ] = False,
    user_licence: Annotated[str, typer.Option(help="Licence of user rows that name none.")] = "",
    safety_licence: Annotated[
        str, typer.Option(help="Licence of safety rows that name none.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and of the order.")] = 0,
    no_lint: Annotated[
        bool, typer.Option("--no-lint", help="Do not look for flaws before mixing.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Mix safety rows into a user's rows, in a style that mends the user's task.

    Same files, options and seed: same bytes. Findings of the lint are printed and stop nothing.
    """
    import json
    import os

    from fastsafe.audit.recipe import load
    from fastsafe.commands import mix

    if (by == "tokens") != (tokenizer is not None):
        raise UsageError(
            f"--by {by}: --tokenizer is {tokenizer!r}, expected a checkpoint with --by "
            "tokens and none with --by rows"
        )
    job = mix.MixSettings(
        user=user,
        safety=safety,
        out=out,
        mitigation=mitigation,
        share=share,
        tokenizer=tokenizer,
        task_format=task_format,
        abstain=abstain,
        rewriter=load.read_rewriter(rewriter) if rewriter else None,
        behaviours=behaviours,
        seed=seed,
        is_linted=not no_lint,
        user_licence=user_licence,
        safety_licence=safety_licence,
    )
    done = mix.mix_files(job, os.environ)
    facts = done.record(job)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, found in facts["lint"].items():
        listed = ", ".join(f"{rule} {n:,}" for rule, n in found.items()) or "none"
        typer.echo(f"lint of {name} rows: findings: {listed}")
    for note in facts["notes"]:
        typer.echo(f"note: {note}")
    if rewriter:
        typer.echo(f"worded by {rewriter}: {facts['worded_by_model']:,} safety rows")
    formats = ", ".join(f"{name} {n:,}" for name, n in facts["safety_formats"].items()) or "none"
    typer.echo(
        f"{facts['user_rows']:,} user rows, {facts['safety_rows']:,} safety rows ({formats})"
    )
    typer.echo(f"{facts['out']}, {facts['card']}")
