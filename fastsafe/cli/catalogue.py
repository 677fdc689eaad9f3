"""``fastsafe list`` and ``fastsafe inspect``: names for recipes, contents of checkpoints."""

from typing import Annotated

import typer

from fastsafe.cli.options import AsJson, CheckpointName, echo, show

KINDS = (
    *("tasks", "formats", "judges", "guards", "mitigations", "objectives", "manipulations"),
    *("styles", "presets", "benchmarks", "sources", "models", "checkpoints", "recipes"),
)


def list_parts(
    what: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help=f"What to list, in the singular or plural: {', '.join(KINDS)}.",
            autocompletion=lambda incomplete: [k for k in KINDS if k.startswith(incomplete)],
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the names that recipes and options can use.

    Exit codes: 0 done, 1 error, 2 usage.
    """
    import json

    from fastsafe.commands import catalogue

    entries = catalogue.entries(what)
    if as_json:
        typer.echo(json.dumps([{"id": name, "about": about} for name, about in entries.items()]))
        return
    width = max(map(len, entries))
    for name, about in entries.items():
        echo(f"{name:<{width}}  {about}".rstrip())


def inspect(
    checkpoint: CheckpointName,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint or an adapter holds.

    Nothing of it is run.

    Exit codes: 0 done, 1 error, 2 usage.
    """
    from fastsafe.commands import catalogue

    show(catalogue.inspect(checkpoint), as_json)
