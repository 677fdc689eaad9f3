"""Checkpoints of a job: one safetensors file with its tensors, and the rest as JSON in its header.

The data order and the dropout masks follow from the job's seed and its number of steps, so that no
generator's state is saved. A file is replaced in one rename: killed at any time, a job has its old
checkpoint or its new one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsafe.data.packing import TrainExample
from fastsafe.errors import CheckpointError, UsageError
from fastsafe.io import atomic, safetensors
from fastsafe.model.transformer import Transformer
from fastsafe.train.batches import RowSource
from fastsafe.train.config import TrainConfig
from fastsafe.train.objectives import make_objective

FOLDER = ".checkpoints"
_FILE = "state.safetensors"
_KEY = "fastsafe.train/1"
_SAMPLE = 1024  # elements of each weight that enter the hash of the base


@dataclass(frozen=True)
class TrainProgress:
    """Progress of a job as its checkpoint holds it.

    Attributes:
        losses: Loss of every step taken.
        num_tokens: Tokens of all steps taken, prompts included.
        seconds: Seconds spent training, excluding time parked.
        stopped_early: Whether the drift monitor ended the job.
        adapter_sha256: Hash of the adapter's folder, once the job has ended.
    """

    losses: tuple[float, ...] = ()
    num_tokens: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    adapter_sha256: str | None = None


class JobCheckpoint:
    """The checkpoint file of one job, which need not exist yet."""

    def __init__(self, out_dir: Path, name: str, identity: Mapping[str, Any]) -> None:
        """Set the file's path and the ``identity`` that it must have, of ``job_identity``."""
        self.name = name
        self.path = out_dir / FOLDER / name / _FILE
        self._identity = dict(identity)

    def peek(self) -> TrainProgress | None:
        """Read the job's progress; None without a checkpoint.

        Raises:
            CheckpointError: The file is damaged.
            UsageError: It belongs to another config, other rows or another base.
        """
        atomic.remove_leftovers(self.path.parent)
        if not self.path.exists():
            return None
        try:
            saved = json.loads(safetensors.read_header(self.path).metadata[_KEY])
            identity, raw = saved["identity"], saved["progress"]
            progress = TrainProgress(**{**raw, "losses": tuple(raw["losses"])})
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(
                f"{self.path}: is no checkpoint of training, expected one; delete it to train "
                f"{self.name!r} from the start"
            ) from None
        changed = [
            f"{key} {identity.get(key)!r} (now {value!r})"
            for key, value in self._identity.items()
            if identity.get(key) != value
        ]
        if changed:
            raise UsageError(
                f"the checkpoint of job {self.name!r} has {', '.join(changed)}; train "
                f"into another folder, or delete {self.path.parent} to start over"
            )
        return progress

    def read(self) -> dict[str, Tensor]:
        """Read the tensors."""
        return safetensors.read(self.path)

    def write(self, progress: TrainProgress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = json.dumps({"identity": self._identity, "progress": vars(progress)})
        safetensors.write(self.path, tensors, {_KEY: metadata})


def job_identity(
    config: TrainConfig, rows: Mapping[RowSource, Sequence[TrainExample]], base: str
) -> dict[str, Any]:
    """Return what must equal a checkpoint's to resume it: settings, the rows' hash, the base."""
    digest = hashlib.sha256()
    for source, examples in sorted(rows.items()):
        for example in examples:
            digest.update(f"{source} {example.token_ids} {example.trained}\n".encode())
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    targets = config.target_modules
    settings["target_modules"] = targets if isinstance(targets, str) else list(targets)
    settings["objective"] = repr(make_objective(config.objective))
    return {**settings, "rows": digest.hexdigest()[:16], "base": base}


def base_digest(model: Transformer) -> str:
    """Hash the base: its config, dtype, type of device and a sample of every weight."""
    digest = hashlib.sha256(f"{model.config} {model.dtype} {model.device.type}".encode())
    for tensor in model.parameters():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
