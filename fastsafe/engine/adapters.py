"""The linear layers of one step: each row's own adapter, mixed in or merged into the weights."""

import threading
from collections.abc import Sequence
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastsafe.model.cpu_decoder import AdapterPatch, Span
from fastsafe.model.lora import BASE, AdapterBank, MergedWeights
from fastsafe.model.transformer import Project, Transformer

Mode = Literal["merged", "mixed"]


class Merged:
    """Merged weights of the adapters in use, one copy each, shared by all lanes."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        # by slot and the bank's version: another adapter may take the slot
        self._copies: WeakValueDictionary[tuple[int, int], MergedWeights] = WeakValueDictionary()

    def get(self, slot: int) -> MergedWeights | None:
        """Weights for rows with this adapter, which live as long as somebody holds them."""
        if slot == BASE:
            return None
        with self._lock:
            key = slot, self._bank.version
            weights = self._copies.get(key)
            if weights is None:
                weights = self._bank.merged(slot)
                assert weights is not None
                self._copies[key] = weights
            return weights


class Projections:
    """Makes the ``Project`` of each step of one lane whose model ``model.native`` does not take.

    Args:
        bank: The adapters.
        merged: Weights to take for rows of an adapter; None adds updates to the base's results.
    """

    def __init__(self, bank: AdapterBank, merged: Merged | None) -> None:
        self._bank = bank
        self._merged = merged
        self._held: dict[int, Project | None] = {}  # of the last step's adapters

    def clear(self) -> None:
        """Let go of merged weights."""
        self._held = {}

    def of(self, segments: Sequence[Sequence[int]], num_kept: int) -> Project | None:
        """Projection of packed rows that are sorted by adapter.

        Args:
            segments: Slot, end of its packed rows and end of its kept rows, for each adapter.
            num_kept: Kept rows, those beyond the last segment included: copies of its last row.
        """
        if self._merged is None:
            slots, ends, _ = torch.tensor([[0, 0, 0], *segments]).unbind(1)
            return self._bank.mixed(slots[1:].repeat_interleave(ends.diff()))
        self._held = {
            slot: self._held[slot] if slot in self._held else self._merged.get(slot)
            for slot, _, _ in segments
        }
        last = len(segments) - 1
        parts = [
            _Part(self._held[slot], end, num_kept if i == last else kept)
            for i, (slot, end, kept) in enumerate(segments)
        ]
        return parts[0].project if last == 0 else _Parts(self._bank.model, parts)


class Changes:
    """Makes the spans of each step of one lane of a CPU in fp32; see ``Projections``."""

    def __init__(self, bank: AdapterBank, merged: Merged | None) -> None:
        self._bank = bank
        self._merged = merged
        # of the last step's adapters; merged weights are held, so that other lanes find them
        self._held: dict[int, tuple[MergedWeights | None, AdapterPatch | None]] = {}

    def clear(self) -> None:
        """Let go of merged weights."""
        self._held = {}

    def of(self, segments: Sequence[Sequence[int]], num_kept: int) -> list[Span]:
        """Spans of packed rows that are sorted by adapter; see ``Projections.of``."""
        self._held = {
            slot: self._held[slot] if slot in self._held else self._make(slot)
            for slot, _, _ in segments
        }
        spans = [Span(self._held[slot][1], end, kept) for slot, end, kept in segments]
        spans[-1] = spans[-1]._replace(kept_end=num_kept)
        return spans

    def _make(self, slot: int) -> tuple[MergedWeights | None, AdapterPatch | None]:
        model = self._bank.model
        if slot == BASE:
            return None, None
        if self._merged is None:
            return None, AdapterPatch(model, updates=self._bank.updates(slot))
        merged = self._merged.get(slot)
        assert merged is not None, "only the base has none"
        return merged, AdapterPatch(model, merged.weights)


class _Part:
    def __init__(self, project: Project | None, end: int, kept_end: int) -> None:
        self.project = project
        self.end = end
        self.kept_end = kept_end


class _Parts:
    """Rows of different adapters, each multiplied by its own merged weights."""

    def __init__(self, model: Transformer, parts: Sequence[_Part]) -> None:
        self._model = model
        self._parts = parts

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        found, begin = [], 0
        for part in self._parts:
            end = part.end if rows is None else part.kept_end
            if end > begin:
                own = x[begin:end]
                project = part.project
                if project is None:
                    found.append(self._model.linear(layer, name, own))
                else:
                    found.append(project(layer, name, own, rows))
            begin = end
        return torch.cat(found)
