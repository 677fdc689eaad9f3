"""``fastsafe mix``: mix safety rows into a user's fine-tuning rows."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastsafe.cli.options import AsJson, echo
from fastsafe.errors import UsageError

ShareUnit = Literal["rows", "tokens"]


def mix(
    user: Annotated[
        Path,
        typer.Argument(
            metavar="USER", help="The user's rows: .jsonl, .json, .csv, .tsv or .parquet."
        ),
    ],
    safety: Annotated[
        Path,
        typer.Argument(metavar="SAFETY", help="Safety rows, or behaviours with --behaviours."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help=".jsonl file to write, with the data card beside it; - writes to standard output, "
            "without a card.",
        ),
    ],
    column_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="ROLE=KEY,...",
            help="Columns that the user's rows are made of; as in train.",
        ),
    ] = None,
    mitigation: Annotated[
        str,
        typer.Option(
            help="How safety rows are chosen and styled; see 'fastsafe list mitigations'."
        ),
    ] = "paraphrase",
    share: Annotated[float, typer.Option(help="Safety rows as a fraction of the result.")] = 0.1,
    by: Annotated[ShareUnit, typer.Option(help="Unit of the share.")] = "rows",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Checkpoint whose tokenizer counts the tokens."),
    ] = None,
    task_format: Annotated[
        str, typer.Option(help="Format of the user's rows, which task_styled needs.")
    ] = "",
    abstain: Annotated[
        bool, typer.Option(help="Add an option that refuses if the user's rows have options.")
    ] = False,
    rewriter: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|YAML",
            help="Model that rewords safety requests in the user's style: a checkpoint, or a YAML "
            "file with the section 'rewrite' of a recipe. A rewrite that fails the lint is "
            "discarded for the template's text.",
        ),
    ] = None,
    behaviours: Annotated[
        bool,
        typer.Option(help="SAFETY holds behaviours: make a refused row of each in every format."),
    ] = False,
    user_licence: Annotated[str, typer.Option(help="Licence of user rows that name none.")] = "",
    safety_licence: Annotated[
        str, typer.Option(help="Licence of safety rows that name none.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice and the order of rows.")] = 0,
    no_lint: Annotated[bool, typer.Option(help="Do not lint the sets before mixing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Mix safety rows into a user's rows. They are dressed in the style of the user's task.

    Equal files, options and seed give equal bytes. Findings of the lint are printed and do not
    stop the command.
    """
    import json
    import os

    from fastsafe.audit.recipe import load
    from fastsafe.commands import mix
    from fastsafe.data.shapes import parse_mapping
    from fastsafe.io import atomic

    if (by == "tokens") != (tokenizer is not None):
        raise UsageError(
            f"--by {by}: --tokenizer is {tokenizer!r}, expected a checkpoint with --by "
            "tokens and none with --by rows"
        )
    if out.suffix.lower() not in ("", ".jsonl", ".ndjson"):
        raise UsageError(
            f"--out: {out} is no name of a JSONL file, expected one that ends in .jsonl; the data "
            "card is written beside it"
        )
    settings = mix.MixSettings(
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
        mapping=parse_mapping(column_map) if column_map else None,
    )
    facts = mix.mix_files(settings, os.environ).record(settings)
    # what goes to standard output is the rows alone where they are written there
    say = partial(echo, err=atomic.stream_of(out) == 1)
    if as_json:
        say(json.dumps(facts))
        return
    for name, rules in facts["lint"].items():
        counts = ", ".join(f"{rule} {n:,}" for rule, n in rules.items()) or "none"
        say(f"lint of {name} rows: findings: {counts}")
    for note in facts["notes"]:
        say(f"note: {note}")
    if rewriter:
        say(f"worded by {rewriter}: {facts['worded_by_model']:,} safety rows")
    formats = ", ".join(f"{name} {n:,}" for name, n in facts["safety_formats"].items()) or "none"
    say(f"{facts['user_rows']:,} user rows, {facts['safety_rows']:,} safety rows ({formats})")
    if facts["card"]:
        say(f"{facts['out']}, {facts['card']}")
