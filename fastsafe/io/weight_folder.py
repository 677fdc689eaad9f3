"""A folder of weights: whether it is an adapter or a checkpoint, and its hash."""

import hashlib
from pathlib import Path

from fastsafe.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"  # the names of PEFT
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter rather than a checkpoint."""
    return (folder / ADAPTER_CONFIG).is_file()


def weights_sha256(folder: Path) -> str | None:
    """Hash the weights and the config of an adapter or a checkpoint; None if a file is missing.

    An adapter's config counts because its alpha scales the weights.
    """
    if not is_adapter(folder):
        from fastsafe.io.checkpoint import Checkpoint  # imports torch

        try:
            return Checkpoint(folder).sha256()
        except CheckpointError:
            return None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return None
    total = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes())
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
