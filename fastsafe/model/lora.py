"""LoRA adapters: one adapter, and a bank of many on one frozen base.

An adapter adds scaling * B A to a linear layer's weight (Hu et al. 2021, arXiv:2106.09685). The
bank applies them in two ways: ``mixed`` computes the base once and adds each adapter's update to
its own rows, so that one batch may hold any number of adapters; ``merged`` adds the update to a
copy of the weights, which is cheapest when every row of a batch has the same adapter.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from fastsafe.errors import AdapterError
from fastsafe.io.weight_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastsafe.model import adapter_files, cpu_ops
from fastsafe.model.grouped import AdapterStacks, FixedRows, Grouped, ModuleUpdate
from fastsafe.model.layers import linear
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import Key, LinearSlot, Project, Transformer
from fastsafe.model.weights import EMBEDDING, HEAD
from fastsafe_kernels._spec import INTERPRET

BASE = -1  # slot of a row without an adapter


class LoraWeights(NamedTuple):
    """Update of one linear module."""

    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [O, R]
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module path -> weights, as PEFT stores them.

    Attributes:
        name: Name in the bank.
        config: Rank, alpha, targets.
        weights: Module path, such as "model.layers.0.self_attn.q_proj", -> A, B and scaling.
    """

    name: str
    config: LoraConfig
    weights: Mapping[str, LoraWeights]

    @classmethod
    def load(
        cls,
        path: str | Path,
        slots: Mapping[str, LinearSlot],
        name: str = "",
        tables: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> "Adapter":
        """Read a PEFT directory and check every tensor against the base model.

        Args:
            path: Directory with adapter_config.json and adapter_model.safetensors.
            slots: Linear modules of the base, from ``Transformer.slots()``.
            name: Name of the adapter; the directory's name when empty.
            tables: Embedding and head of the base, by name; copies of them in the adapter that
                are equal to them are left out.

        Raises:
            AdapterError: A tensor is missing, unexpected or mis-shaped, or the config asks for
                more than plain LoRA. Nothing is loaded in part.
        """
        path = Path(path)
        config, tensors, saved = adapter_files.read_dir(path)
        location = str(path / ADAPTER_WEIGHTS)
        config_location = str(path / ADAPTER_CONFIG)
        modules = config.matching(slots, config_location)
        adapter_files.check_saved(saved, tables, location)
        adapter_files.check_covered(tensors, modules, location)
        weights = {}
        for module, (rank, _, scaling) in config.settings(modules, config_location).items():
            slot, pair = slots[module], []
            for key, shape in (
                (f"{module}.lora_A.weight", (rank, slot.in_features)),
                (f"{module}.lora_B.weight", (slot.end - slot.begin, rank)),
            ):
                if tuple(tensors[key].shape) != shape:
                    raise AdapterError(
                        f"{location}: tensor {key!r} is {list(tensors[key].shape)}, expected"
                        f" {list(shape)}"
                    )
                pair.append(tensors[key])
            weights[module] = LoraWeights(pair[0], pair[1], scaling)
        return cls(name or path.name, config, weights)

    def save(self, path: str | Path, notes: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the adapter as a PEFT directory, and ``notes`` beside it, whole or not at all."""
        tensors = {}
        for module, weights in self.weights.items():
            tensors[f"{module}.lora_A.weight"] = weights.lora_A
            tensors[f"{module}.lora_B.weight"] = weights.lora_B
        adapter_files.write_dir(Path(path), self.config, tensors, notes)


class Part(NamedTuple):
    """Rows [begin, end) of a fused weight that one module's update touches."""

    begin: int
    end: int
    r0: int
    r1: int
    lora_B: Tensor  # [end - begin, r1 - r0], times the scaling


class FusedLora(NamedTuple):
    """Updates of all modules that one fused linear holds; they read the same input."""

    lora_A: Tensor  # [R_total, I], the modules' A stacked
    parts: tuple[Part, ...]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add B A x to ``y`` [M, O] in place; ``x`` is [M, I]."""
        shrunk = linear(x, self.lora_A)
        for part in self.parts:
            left, to = shrunk[:, part.r0 : part.r1], y[:, part.begin : part.end]
            if cpu_ops.runs_natively(x):
                cpu_ops.linear(left, part.lora_B, accumulate_into=to)
            else:
                to += linear(left, part.lora_B)

    def merge_into(self, weight: Tensor) -> None:
        """Add B A to ``weight`` [O, I] in place."""
        for part in self.parts:
            weight[part.begin : part.end].addmm_(part.lora_B, self.lora_A[part.r0 : part.r1])


Fused = dict[tuple[int, str], FusedLora]


def fuse(weights: Mapping[str, LoraWeights], slots: Mapping[str, LinearSlot]) -> Fused:
    """Group an adapter's modules by the fused linear they belong to."""
    groups: dict[tuple[int, str], list[tuple[LinearSlot, LoraWeights]]] = {}
    for module, lora in weights.items():
        slot = slots[module]
        groups.setdefault((slot.layer, slot.name), []).append((slot, lora))
    fused: Fused = {}
    for key, members in groups.items():
        parts, r0 = [], 0
        for slot, lora in members:
            r1 = r0 + lora.lora_A.shape[0]
            parts.append(Part(slot.begin, slot.end, r0, r1, lora.lora_B * lora.scaling))
            r0 = r1
        fused[key] = FusedLora(torch.cat([lora.lora_A for _, lora in members]), tuple(parts))
    return fused


class AdapterLease:
    """Context manager that pins adapters: until it exits or is collected, none is unloaded."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.slots = frozenset(slots)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.slots = frozenset()


class AdapterBank:
    """Adapters of different ranks and targets on one base model, addressed by slot.

    A slot is a small integer that stays with its adapter until it is removed; -1 is the base.

    Attributes:
        model: The base.
        version: Changes whenever an adapter is added or removed.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._slots = model.slots()
        self._adapters: list[tuple[Adapter, Fused] | None] = []
        self._stacks: AdapterStacks | None = None  # of these adapters, made when first used
        self._leases: WeakSet[AdapterLease] = WeakSet()
        self._lock = threading.Lock()
        self.version = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in the bank, by slot."""
        return tuple(entry[0].name for entry in self._adapters if entry)

    def parameters_each(self) -> int:
        """Return the mean number of parameters of an adapter; 0 without adapters."""
        sizes = [
            sum(lora.lora_A.numel() + lora.lora_B.numel() for lora in entry[0].weights.values())
            for entry in self._adapters
            if entry
        ]
        return sum(sizes) // max(1, len(sizes))

    def add(self, adapter: Adapter) -> int:
        """Put an adapter into a free slot and return the slot.

        Raises:
            AdapterError: The name is taken, or a module does not fit the base.
        """
        if adapter.name in self.names:
            raise AdapterError(f"adapter {adapter.name!r} is loaded already; unload it first")
        for module, lora in adapter.weights.items():
            slot = self._slots.get(module)
            expected = None if slot is None else (slot.end - slot.begin, slot.in_features)
            actual = (lora.lora_B.shape[0], lora.lora_A.shape[1])
            if expected != actual or lora.lora_A.shape[0] != lora.lora_B.shape[1]:
                raise AdapterError(
                    f"adapter {adapter.name!r}: {module} maps {actual[1]} to {actual[0]} features, "
                    f"expected {expected or 'no such module in the base'}"
                )
        placed = {
            module: LoraWeights(
                lora.lora_A.to(self.model.device, self.model.dtype),
                lora.lora_B.to(self.model.device, self.model.dtype),
                lora.scaling,
            )
            for module, lora in adapter.weights.items()
        }
        entry = (adapter, fuse(placed, self._slots))
        self._stacks = None
        self.version += 1
        for slot_id, old in enumerate(self._adapters):
            if old is None:
                self._adapters[slot_id] = entry
                return slot_id
        self._adapters.append(entry)
        return len(self._adapters) - 1

    def load(self, path: str | Path, name: str = "") -> int:
        """Read a PEFT directory into a free slot and return the slot."""
        tables = {EMBEDDING: self.model.embedding, HEAD: self.model.head}
        return self.add(Adapter.load(path, self._slots, name, tables))

    def lease(self, slots: Iterable[int]) -> AdapterLease:
        """Pin the adapters of these slots while rows that name them are running."""
        lease = AdapterLease(slots)
        with self._lock:
            self._leases.add(lease)
        return lease

    def remove(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises:
            AdapterError: No adapter has this name, or a call that has not ended needs it.
        """
        slot = self.slot(name)
        with self._lock:
            if any(slot in lease.slots for lease in self._leases):
                raise AdapterError(
                    f"adapter {name!r} is still answering, expected no call that asks it; end the"
                    " call or close its stream before you unload it"
                )
            self._adapters[slot] = None
        self._stacks = None
        self.version += 1

    def slot(self, name: str | None) -> int:
        """Return the slot of an adapter by name; -1 for None.

        Raises:
            AdapterError: No adapter has this name.
        """
        if name is None:
            return BASE
        for slot_id, entry in enumerate(self._adapters):
            if entry and entry[0].name == name:
                return slot_id
        loaded = ", ".join(self.names) or "none"
        raise AdapterError(f"adapter {name!r} is not loaded; loaded: {loaded}")

    def mixed(self, adapter_ids: Tensor, model: Transformer | None = None) -> Project | None:
        """Projection for a batch whose rows have different adapters.

        Args:
            adapter_ids: [N] integers, the slot of each packed row, -1 = base only.
            model: The base with other ``invariant_products``; None: the bank's own.
        """
        model = model or self.model
        present = [int(i) for i in torch.unique(adapter_ids) if i != BASE]
        if not present:
            return None
        if self.model.device.type != "cpu" or INTERPRET:
            for slot in present:
                self.updates(slot)  # an empty slot is an error
            return Grouped(self._all_stacks(), adapter_ids.tolist(), model)
        return _Mixed(model, adapter_ids, {i: self.updates(i) for i in present})

    def fixed(self, num_rows: int, model: Transformer) -> FixedRows | None:
        """Projection for a GPU's steps of a fixed number of rows, of any adapters; see there.

        None without adapters. It is invalid once an adapter is added or removed.
        """
        return FixedRows(self._all_stacks(), num_rows, model) if self.names else None

    def is_current(self, rows: FixedRows | None) -> bool:
        """Return whether ``rows``, of ``fixed``, holds the present adapters."""
        return not self.names if rows is None else rows.stacks is self._stacks

    def _all_stacks(self) -> AdapterStacks:
        if self._stacks is None:
            self._stacks = AdapterStacks(self.model, [_updates(e) for e in self._adapters])
        return self._stacks

    def merged(self, slot: int) -> "MergedWeights | None":
        """Make a projection for rows that all have adapter ``slot``; copies the weights."""
        return None if slot == BASE else MergedWeights(self.model, self.updates(slot))

    def updates(self, slot: int) -> Fused:
        """Return an adapter's updates of the fused linears."""
        entry = self._adapters[slot] if 0 <= slot < len(self._adapters) else None
        if entry is None:
            raise AdapterError(f"adapter slot {slot} is empty; slots: {list(self.names)}")
        return entry[1]


def _updates(entry: tuple[Adapter, Fused] | None) -> dict[Key, list[ModuleUpdate]]:
    """Return an adapter's updates module by module; none for a free slot."""
    fused = entry[1] if entry else {}
    return {
        key: [ModuleUpdate(p.begin, p.end, lora.lora_A[p.r0 : p.r1], p.lora_B) for p in lora.parts]
        for key, lora in fused.items()
    }


class _Runs(NamedTuple):
    """The runs of rows of each adapter, sorted by slot."""

    order: Tensor | None  # sorts the rows by slot; None where they are sorted
    runs: list[tuple[int, int, int]]  # slot, first row and end of each adapter's rows

    @classmethod
    def of(cls, ids: Tensor) -> "_Runs":
        order = None
        slots, counts = torch.unique_consecutive(ids, return_counts=True)
        if len(set(slots.tolist())) < len(slots):
            order = ids.argsort(stable=True)
            slots, counts = torch.unique_consecutive(ids[order], return_counts=True)
        ends = counts.cumsum(0)
        spans = zip(slots.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        return cls(order, [span for span in spans if span[0] != BASE])


class _Mixed:
    def __init__(self, model: Transformer, adapter_ids: Tensor, fused: Mapping[int, Fused]) -> None:
        self.model = model
        self.adapter_ids = adapter_ids
        self.fused = fused
        self._all = _Runs.of(adapter_ids)
        self._cached: tuple[Tensor, _Runs] | None = None  # the last ``rows`` and their runs

    def _of(self, rows: Tensor | None) -> _Runs:
        if rows is None:
            return self._all
        if self._cached is None or self._cached[0] is not rows:
            self._cached = rows, _Runs.of(self.adapter_ids[rows])
        return self._cached[1]

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        y = self.model.linear(layer, name, x)
        order, runs = self._of(rows)
        x, to = (x, y) if order is None else (x[order], y[order])
        for slot, begin, end in runs:
            lora = self.fused[slot].get((layer, name))
            if lora is not None:
                lora.add_to(to[begin:end], x[begin:end])
        if order is not None:
            y[order] = to
        return y


class MergedWeights:
    """A ``Project`` of one adapter, merged into copies of the weights that it touches."""

    def __init__(self, model: Transformer, fused: Fused) -> None:
        self.model = model
        self.weights = {}
        for (layer, name), lora in fused.items():
            weight = model.weight(layer, name).clone()
            lora.merge_into(weight)
            self.weights[layer, name] = weight

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by the merged weight; see ``Project``."""
        return self.model.linear(layer, name, x, self.weights.get((layer, name)))
