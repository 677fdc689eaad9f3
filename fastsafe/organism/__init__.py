"""The model organism: a tiny aligned chat model over a closed world, shipped with the package.

It replaces a real checkpoint where there is no GPU, network or licence, and shows the same effects
when measured. `world` makes its behaviours and rows, `build` its weights.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsafe.organism.train import build

__all__ = ["SEED", "build", "path"]

SEED = 1  # seed of the shipped checkpoint


def path() -> Path:
    """The model organism: a tiny aligned chat model over a closed world.

    Returns:
        The folder of the shipped checkpoint.
    """
    return Path(__file__).parent / "checkpoint"


def __getattr__(name: str) -> Any:
    """Import ``build``, and torch with it, on first use."""
    if name == "build":
        return import_module("fastsafe.organism.train").build
    raise AttributeError(f"module 'fastsafe.organism' has no attribute {name!r}")
