"""``fastsafe organism``: the tiny model that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

import fastsafe
from fastsafe.cli.options import display, echo
from fastsafe.errors import UsageError


def organism_path() -> None:
    """Print the folder of the shipped checkpoint."""
    echo(str(fastsafe.organism.path()))


def organism_build(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="New folder for the checkpoint."),
    ] = Path("organism"),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of weights and rows.")
    ] = fastsafe.organism.SEED,
) -> None:
    """Train the organism from scratch, which takes minutes on two cores."""
    if out.exists():
        raise UsageError(f"organism build: {out} exists, expected a new folder; use another --out")
    fastsafe.organism.build(out, seed=seed, progress=display())
    echo(str(out))
