"""``fastsafe list`` and ``fastsafe inspect``: what there is to name, what a checkpoint holds."""

from enum import StrEnum
from typing import Annotated

import typer

from fastsafe.cli.options import AsJson, Debug, shown


class Listed(StrEnum):
    """What ``fastsafe list`` can list."""

    TASKS = "tasks"
    FORMATS = "formats"
    JUDGES = "judges"
    MITIGATIONS = "mitigations"
    MODELS = "models"
    RECIPES = "recipes"


def list_parts(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what a recipe can name."""
    import json

    from fastsafe.audit import catalogue

    found = catalogue.entries(what.value)
    if as_json:
        typer.echo(json.dumps([{"id": name, "about": about} for name, about in found.items()]))
        return
    width = max(map(len, found))
    for name, about in found.items():
        typer.echo(f"{name:<{width}}  {about}".rstrip())


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, or 'organism'.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint holds, running nothing of it."""
    import json

    from fastsafe.audit import catalogue

    facts = catalogue.inspect(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {shown(value)}")
