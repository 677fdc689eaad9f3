"""``fastsafe list`` and ``fastsafe inspect``: what there is to name, what a checkpoint holds."""

from typing import Annotated, Literal

import typer

from fastsafe.cli.options import AsJson, CheckpointName, Debug, show

Listed = Literal["tasks", "formats", "judges", "mitigations", "models", "recipes"]


def list_parts(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what a recipe can name."""
    import json

    from fastsafe.commands import catalogue

    found = catalogue.entries(what)
    if as_json:
        typer.echo(json.dumps([{"id": name, "about": about} for name, about in found.items()]))
        return
    width = max(map(len, found))
    for name, about in found.items():
        typer.echo(f"{name:<{width}}  {about}".rstrip())


def inspect(
    checkpoint: CheckpointName,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint holds, running nothing of it."""
    from fastsafe.commands import catalogue

    show(catalogue.inspect(checkpoint), as_json)
