"""Write edited checkpoints tensor by tensor, for edits that no adapter can hold.

The result has the names, dtypes and config of the model that
was tuned and is a folder that any loader reads.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.atomic import publish_dir
from fastsafe.io.checkpoint import INDEX, WEIGHTS
from fastsafe.model import weights as w
from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, LoraWeights
from fastsafe.model.weight_edits import read_like, wide
from fastsafe.model.weights import TensorSource

Edit = Callable[[str, Tensor, Tensor], Tensor]  # name, base, tuned -> edited, all wide

SHARD_BYTES = 4 << 30  # largest weight file, unless one tensor alone is larger
_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # configs, templates, tokenizers


def write_edited(
    base: TensorSource,
    tuned: Adapter | TensorSource,
    edit: Edit,
    out: Path,
    *,
    notes: Mapping[str, str],
) -> None:
    """Write the checkpoint of ``edit`` applied to every tensor of a tuned model.

    A tied head that the file holds all the same is edited as the embedding it repeats.

    Args:
        base: The model before tuning.
        tuned: An adapter on ``base``, or the tuned model's own checkpoint.
        edit: Called once per tensor with its name; arguments and result are float32, or float64
            where the file holds that.
        out: Folder to write, whole or not at all; an older one is replaced.
        notes: Further files, name -> text.

    Raises:
        CheckpointError: A checkpoint is no folder, or its tensors do not fit its config or the
            base's.
    """
    like = base if isinstance(tuned, Adapter) else tuned
    config = ModelConfig.from_json(like.config(), f"{like.path}/config.json")
    if not like.path.is_dir():
        raise CheckpointError(f"{like.path}: is a file, expected a folder with its config")
    like = w.checked(like, config)
    base = w.checked(base, config)
    tuned = tuned if isinstance(tuned, Adapter) else like
    places = {place.name for place in w.placements(config)}
    shards = _shards(like)
    out.parent.mkdir(parents=True, exist_ok=True)
    with publish_dir(out) as folder:
        for file in like.path.iterdir():
            if file.suffix in _TEXT_SUFFIXES and file.is_file() and file.name != INDEX:
                shutil.copyfile(file, folder / file.name)
        for file_name, names in shards.items():
            made = {}
            for name in names:
                key = w.EMBEDDING if name == w.HEAD and config.tie_word_embeddings else name
                if key in places:
                    dtype = safetensors.DTYPES[like.dtypes[name]]
                    made[name] = edit(key, *_both(key, base, tuned)).to(dtype)
                else:
                    made |= like.read([name])
            safetensors.write(folder / file_name, made, {"format": "pt"})
        if len(shards) > 1:
            index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name, note in notes.items():
            (folder / name).write_text(note, encoding="utf-8")


def merged(weight: Tensor, lora: LoraWeights | None) -> Tensor:
    """Return a weight [O, I] with an update added, in float32 or wider."""
    total = wide(weight)
    if lora is None:
        return total
    return total + lora.scaling * (lora.lora_B.to(total) @ lora.lora_A.to(total))


def dare(base: Tensor, tuned: Tensor, drop: float, seed: int, name: str) -> Tensor:
    """Drop entries of tuned - base at random and rescale the rest: base + kept / (1 - drop).

    Unbiased: the mean over seeds is ``tuned``. With ``drop`` 0 it is ``tuned``, bit for bit.

    Args:
        base: Any shape, float32 or float64.
        tuned: As ``base``.
        drop: Probability that an entry is dropped, in [0, 1).
        seed: Seeds the drops together with ``name``.
        name: Name of the tensor.

    Source: Yu et al. 2023, arXiv:2311.03099.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    kept = torch.rand(base.shape, generator=generator) >= drop
    return torch.where(kept, tuned + (tuned - base) * (drop / (1 - drop)), base)


def _both(name: str, base: TensorSource, tuned: Adapter | TensorSource) -> tuple[Tensor, Tensor]:
    """Read one tensor before and after tuning, wide."""
    if isinstance(tuned, Adapter):
        before = base.read([name])[name]
        return wide(before), merged(before, tuned.weights.get(name.removesuffix(".weight")))
    after = tuned.read([name])[name]
    return wide(read_like(base, name, tuned)), wide(after)


def _shards(like: TensorSource) -> dict[str, list[str]]:
    """Return the names of the weight files and of the tensors in each, in the old order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in like.names:
        numel = 1
        for side in like.shapes[name]:
            numel *= side
        num_bytes = numel * safetensors.DTYPES[like.dtypes[name]].itemsize
        if groups[-1] and size + num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}
