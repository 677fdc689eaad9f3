"""PEFT adapter directories: adapter_config.json + adapter_model.safetensors, read and written."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsafe.errors import AdapterError, shown
from fastsafe.io import safetensors
from fastsafe.io.atomic import publish_dir
from fastsafe.io.json_file import read_json
from fastsafe.io.weight_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastsafe.model.peft import LoraConfig, parse_config

_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20
# The adapter's own name stands before ".weight" in what is saved without PEFT's save_pretrained.
_LORA_KEY = re.compile(r"(?P<key>.+\.lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_MERGE = (
    "merge the adapter into the base with PEFT (merge_and_unload) and load the result as a "
    "checkpoint"
)
_UNSUPPORTED = {  # part of a name -> what such a tensor is
    "lora_embedding_": "LoRA on the embedding",
    "lora_magnitude_vector": "a magnitude of DoRA",
    "trainable_tokens": "rows of the embedding for trained tokens",
    ".bias": "a trained bias",
}


class AdapterFiles(NamedTuple):
    """The content of an adapter directory.

    Attributes:
        config: The checked config.
        lora: "<module>.lora_A.weight" and "<module>.lora_B.weight" -> tensor.
        saved: Other tensors by the name that the base model gives them, such as an embedding.
    """

    config: LoraConfig
    lora: dict[str, Tensor]
    saved: dict[str, Tensor]


def read_config(path: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """Read the config of an adapter directory, checked and as it is.

    Raises:
        AdapterError: A file is missing, or the config asks for more than plain LoRA.
        CheckpointError: The file cannot be read or is malformed.
    """
    if not path.is_dir():
        if path.exists():
            raise AdapterError(f"adapter {path}: is a file; give the folder PEFT wrote")
        missing = f"adapter {path}: no such directory; give the folder PEFT wrote"
        raise AdapterError(missing) from FileNotFoundError(str(path))
    if not os.path.lexists(path / ADAPTER_CONFIG):
        raise AdapterError(
            f"adapter {path}: {ADAPTER_CONFIG} is missing; give the folder PEFT wrote"
        )
    if not os.path.lexists(path / ADAPTER_WEIGHTS):
        pickles = sorted(p.name for p in path.glob("adapter_model.*"))
        found = f"found only {', '.join(pickles)}, which is refused" if pickles else "none found"
        raise AdapterError(
            f"adapter {path}: {ADAPTER_WEIGHTS} expected, {found}; save it with safe_serialization"
        )
    raw = read_json(path / ADAPTER_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    return parse_config(raw, str(path / ADAPTER_CONFIG)), raw


def read_dir(path: Path) -> AdapterFiles:
    """Read the config and tensors of an adapter directory; names lose PEFT's prefix.

    Raises:
        AdapterError: A file is missing, is a pickle, or holds something else than LoRA weights.
        CheckpointError: A file cannot be read or is malformed.
    """
    config, raw = read_config(path)
    location = path / ADAPTER_WEIGHTS
    lora: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    adapters: set[str | None] = set()
    tensors = safetensors.read(location)
    for name, tensor in tensors.items():
        key = name.removeprefix(_PREFIX)
        if key.startswith("layers."):  # transformers, too, adds what is missing
            key = f"model.{key}"
        match = _LORA_KEY.fullmatch(key)
        if match:
            adapters.add(match["adapter"])
            lora[match["key"] + ".weight"] = tensor
        else:
            saved[key] = tensor
    if len(adapters) > 1:
        raise AdapterError(
            f"{location}: holds weights of {len(adapters)} adapters "
            f"({', '.join(sorted(map(repr, adapters)))[:80]}), expected one; save each with PEFT"
        )
    if len(lora) + len(saved) < len(tensors):
        raise AdapterError(
            f"{location}: two tensors have one name but for its prefix, expected one of each; save "
            "the adapter with PEFT"
        )
    _check_replaced(raw.get("modules_to_save"), saved, str(path / ADAPTER_CONFIG))
    return AdapterFiles(config, lora, saved)


def check_saved(
    saved: Mapping[str, Tensor], base: Mapping[str, Tensor], location: str | Path
) -> None:
    """Refuse tensors beside the LoRA weights, unless they equal the base's in the base's dtype.

    Trainers save the embedding and the head with an adapter when they have resized them, and often
    when they have not.

    Args:
        saved: As in ``AdapterFiles``.
        base: Embedding and head of the base, by their names.
        location: File that messages name.

    Raises:
        AdapterError: A tensor differs from the base's, or is none of these.
    """
    for name, tensor in saved.items():
        own = base.get(name)
        if own is None:
            kind = next((kind for part, kind in _UNSUPPORTED.items() if part in name), None)
            raise AdapterError(
                f"{location}: tensor {name!a:.120} is {kind}, which is not supported; {_MERGE}"
                if kind
                else f"{location}: tensor {name!a:.120} is unexpected beside the LoRA weights, as "
                "the base model has no such embedding or head"
            )
        if tensor.shape != own.shape:
            raise AdapterError(
                f"{location}: {name} is {list(tensor.shape)}, and the base model's is"
                f" {list(own.shape)}: the adapter comes with a vocabulary of its own; {_MERGE}"
            )
        if not torch.equal(tensor.to(own), own):
            raise AdapterError(
                f"{location}: {name} differs from the base model's, expected LoRA weights alone;"
                f" {_MERGE}"
            )


def check_covered(lora: Mapping[str, Tensor], modules: Iterable[str], location: str | Path) -> None:
    """Refuse weights that are not exactly A and B of each of ``modules``, in a float dtype.

    Raises:
        AdapterError: A tensor is missing, unexpected, or not of a float dtype.
    """
    expected = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    for key in sorted(expected):
        if key not in lora:
            found = f"; its names begin like {next(iter(lora))!a:.80}" if lora else ""
            raise AdapterError(
                f"{location}: tensor {key!r} is missing; the adapter is partial or of another base"
                f" model{found}"
            )
        tensor = lora[key]
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise AdapterError(
                f"{location}: tensor {key!r} is {tensor.dtype}, expected float32, bfloat16 or "
                "float16; save the adapter in one of them"
            )
    unexpected = sorted(lora.keys() - expected)
    if unexpected:
        raise AdapterError(
            f"{location}: {len(unexpected)} unexpected tensors "
            f"({', '.join(ascii(key)[:120] for key in unexpected[:4])}); the config's "
            "target_modules do not name their modules"
        )


def write_dir(
    path: Path,
    config: LoraConfig,
    tensors: Mapping[str, Any],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an adapter directory whole or not at all; an older one is replaced.

    ``notes`` are further files, name -> text, that say where the adapter comes from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish_dir(path) as folder:
        safetensors.write(
            folder / ADAPTER_WEIGHTS,
            {_PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()},
            {"format": "pt"},
        )
        text = json.dumps(config.to_json(), indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        for name, note in notes.items():
            (folder / name).write_text(note, encoding="utf-8")


def _check_replaced(modules: Any, saved: Iterable[str], location: str) -> None:
    """Check that each of ``modules_to_save`` has its tensor in the file."""
    if not modules:
        return
    owners = [name.rpartition(".")[0] for name in saved]
    if not isinstance(modules, list) or not all(
        isinstance(module, str) and any(owner.endswith(module) for owner in owners)
        for module in modules
    ):
        raise AdapterError(
            f"{location}: modules_to_save is {shown(modules)}, expected null or modules whose "
            "tensors are in the adapter's file; take what was not trained out of the list"
        )
