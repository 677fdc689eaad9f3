"""``fastsafe organism``: the tiny model that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

import fastsafe
from fastsafe.cli.options import Debug
from fastsafe.errors import UsageError


def organism_path(debug: Debug = False) -> None:
    """Print where the shipped checkpoint lies."""
    typer.echo(str(fastsafe.organism.path()))


def organism_build(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, a new one.")] = Path(
        "organism"
    ),
    seed: Annotated[int, typer.Option(min=0)] = fastsafe.organism.SEED,
    debug: Debug = False,
) -> None:
    """Train the organism from nothing: minutes on two cores."""
    from fastsafe import progress

    if out.exists():
        raise UsageError(f"organism build: {out} exists, expected a new folder; use another --out")
    with progress.following(progress.for_terminal()) as after_step:
        fastsafe.organism.build(out, seed=seed, on_progress=after_step)
    typer.echo(str(out))
