"""Folders of weights: adapters and whole checkpoints, told apart and hashed."""

import hashlib
from pathlib import Path

from fastsafe.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a checkpoint."""
    return (folder / ADAPTER_CONFIG).is_file()


def weights_sha256(folder: Path) -> str | None:
    """Return the hash of what a folder's answers depend on, None where something is missing.

    An adapter's config counts, too: its alpha scales the weights.
    """
    if not is_adapter(folder):
        from fastsafe.io.checkpoint import Checkpoint

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
