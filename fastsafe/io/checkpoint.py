"""A checkpoint: one safetensors file, or shards with an index, and their JSON configs."""

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

import fastsafe._native as _native
from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.json_file import read_object, read_optional_object
from fastsafe.io.safetensors import TensorInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[\w.+-]+\.safetensors", re.ASCII)
_NUMBERED_SHARD = re.compile(r"model-\d+-of-(?P<count>\d+)\.safetensors", re.ASCII)
# One of the two may be absent although the index lists it: it is tied to the other.
_TIED = ("lm_head.weight", "model.embed_tokens.weight")
_HASH_PIECE_BYTES = 64 << 20


class Checkpoint:
    """The tensors and configs of a folder or of one safetensors file; opening reads the headers.

    Attributes:
        path: The folder or file.
        names: Every tensor, file by file in the order of the data.
        shapes: Shape of each tensor.
        dtypes: Dtype of each tensor as safetensors spells it, e.g. "BF16".

    Raises:
        CheckpointError: The path is missing, holds only pickle files, or a file, the index or
            their agreement is not in order.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._folder, files, index = _locate(self.path)
        headers = {file: safetensors.read_header(self._folder / file).tensors for file in files}
        self._file_of: dict[str, str] = {}
        infos: dict[str, TensorInfo] = {}
        for file, tensors in headers.items():
            for name in tensors:
                if name in infos:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r:.80} is in {self._file_of[name]} and in"
                        f" {file}, expected in one shard"
                    )
                self._file_of[name] = file
            infos |= tensors
        if index is not None:
            _match_index(self._folder / INDEX, index, self._file_of)
        if not infos:
            raise CheckpointError(f"{self.path}: checkpoint has no tensors, expected some")
        self.names = tuple(infos)
        self.shapes = {name: info.shape for name, info in infos.items()}
        self.dtypes = {name: info.dtype for name, info in infos.items()}

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read tensors to the CPU, as ``safetensors.read`` does, one file after another.

        Args:
            names: Tensors to read; None reads all.

        Raises:
            CheckpointError: A name is not in the checkpoint, or a file has changed or is cut short.
        """
        by_file: dict[str, list[str]] = {}
        for name in self.names if names is None else names:
            if name not in self._file_of:
                raise CheckpointError(f"{self.path}: tensor {name!r:.80} is absent")
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, in_file in by_file.items():
            tensors |= safetensors.read(self._folder / file, in_file)
        return tensors

    def config(self) -> dict[str, Any]:
        """Parse config.json, which must be there; its values are not checked here."""
        return read_object(self._folder / "config.json", MAX_CONFIG_BYTES)

    def generation_config(self) -> dict[str, Any]:
        """Parse generation_config.json; empty when there is none."""
        path = self._folder / "generation_config.json"
        return read_optional_object(path, MAX_CONFIG_BYTES) or {}

    def sha256(self) -> str:
        """Hash name, size and content of config.json (if any) and of every weight file.

        Reads everything once, so this takes as long as loading; the folder's own name and other
        files do not matter.

        Returns:
            64 hexadecimal digits.
        """
        total = hashlib.sha256()
        files = sorted(set(self._file_of.values()))
        if os.path.lexists(self._folder / "config.json"):
            files.insert(0, "config.json")
        for name in files:
            size, digest = _sha256(self._folder / name)
            total.update(f"{name} {size} {digest}\n".encode())
        return total.hexdigest()


def _locate(path: Path) -> tuple[Path, list[str], dict[str, Any] | None]:
    """Return the folder, the names of its weight files, and the parsed index if there is one."""
    if path.is_dir():
        try:
            present = set(os.listdir(path))
        except OSError as error:
            raise CheckpointError(f"{path}: folder cannot be listed: {error.strerror}") from None
        if WEIGHTS in present:  # transformers prefers it to an index, too
            return path, [WEIGHTS], None
        if INDEX in present:
            index = read_object(path / INDEX, MAX_INDEX_BYTES)
            return path, _shards(path, index, present), index
        others = sorted(name for name in present if name.endswith(".safetensors"))
        if len(others) == 1 and _num_shards(others[0]) == 1:
            return path, others, None
        if not others:
            _refuse_pickle(path, present)
        raise CheckpointError(
            f"{path}: weights are missing, expected {WEIGHTS} or {INDEX}{_hint(others)}"
        )
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: checkpoint does not exist, expected a folder or a file")
    _refuse_pickle(path.parent, {path.name})
    return path.parent, [path.name], None


def _num_shards(name: str) -> int:
    """Return the number of shards that the name of a shard tells; 0 for other names."""
    match = _NUMBERED_SHARD.fullmatch(name)
    return int(match["count"]) if match else 0


def _hint(others: list[str]) -> str:
    """Say what to do with a folder of other safetensors files."""
    if not others:
        return ""
    if others == ["adapter_model.safetensors"]:
        return "; the folder is an adapter: give its base model, and the adapter beside it"
    if _num_shards(others[0]):
        return f"; {INDEX} names the shards, download it too"
    return f"; rename {others[0]} to {WEIGHTS} if these are the model's weights"


def _refuse_pickle(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        if name.endswith(_PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{folder / name}: weights are a pickle, which can run code, expected safetensors;"
                " on a machine you can lose, load them with transformers and call"
                " save_pretrained(folder, safe_serialization=True)"
            )


def _shards(folder: Path, index: dict[str, Any], present: set[str]) -> list[str]:
    """Return the names of the shards in the index, checked one by one."""
    path = folder / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {weight_map!r:.80}, expected an object")
    shards: dict[str, None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r:.80} is in {shard!r:.80}, expected the plain name of a"
                " .safetensors file in the same folder"
            )
        shards[shard] = None
    for shard in shards:
        if shard not in present:
            raise CheckpointError(f"{path}: shard {shard} is missing; download it again")
    unlisted = sorted(n for n in present - shards.keys() if _NUMBERED_SHARD.fullmatch(n))
    if unlisted:
        raise CheckpointError(
            f"{path}: shard {unlisted[0]} is in the folder but not in the index; remove it or"
            " download the checkpoint again"
        )
    return sorted(shards)


def _match_index(path: Path, index: dict[str, Any], file_of: dict[str, str]) -> None:
    """Check that shards and index have the same tensors in the same files.

    The index's ``total_size`` is not read: every shard is known to be whole without it, and tools
    that merge or convert leave it at an old value.
    """
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: metadata is {metadata!r:.80}, expected an object")
    weight_map = index["weight_map"]
    tied_elsewhere = any(name in file_of for name in _TIED)
    for name, shard in weight_map.items():
        if name not in file_of:
            if name in _TIED and tied_elsewhere:
                continue
            raise CheckpointError(f"{path}: tensor {name!r:.80} is missing, expected in {shard}")
        if file_of[name] != shard:
            raise CheckpointError(
                f"{path}: tensor {name!r:.80} is in {file_of[name]}, expected in {shard}"
            )
    for name, shard in file_of.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{path}: tensor {name!r:.80} of {shard} is unexpected, the index does not list it"
            )


def _sha256(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    try:
        file = _native.File(os.fsencode(path))
        for begin in range(0, file.size, _HASH_PIECE_BYTES):
            digest.update(file.read_bytes(begin, min(_HASH_PIECE_BYTES, file.size - begin)))
    except _native.Error as error:
        raise CheckpointError(f"{path}: {error}") from None
    return file.size, digest.hexdigest()
