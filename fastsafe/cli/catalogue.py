"""``fastsafe list`` and ``fastsafe inspect``: names for recipes, contents of checkpoints."""

from typing import Annotated, Literal

import typer

from fastsafe.cli.options import AsJson, CheckpointName, echo, show

Listed = Literal["tasks", "formats", "judges", "mitigations", "models", "recipes"]


def list_parts(
    what: Annotated[Listed, typer.Argument(help="Kind of names to list.")],
    as_json: AsJson = False,
) -> None:
    """List the names that a recipe can use."""
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
    """Show what a checkpoint holds, without running anything of it."""
    from fastsafe.commands import catalogue

    show(catalogue.inspect(checkpoint), as_json)
