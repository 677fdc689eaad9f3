"""The model organism: a tiny aligned chat model over a closed world, shipped with the package.

It stands in for a real checkpoint where there is no GPU, network or licence, and shows the same
effects by measurement. `world` makes its behaviours and data; `build` makes its weights.
"""

from pathlib import Path


def path() -> Path:
    """Return the folder of the shipped checkpoint."""
    return Path(__file__).parent / "checkpoint"
