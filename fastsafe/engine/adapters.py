"""Linear layers of one step: each row's adapter, mixed in or merged into the weights."""

import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastsafe.model.cpu_decoder import AdapterPatch, Span
from fastsafe.model.lora import BASE, AdapterBank, MergedWeights
from fastsafe.model.transformer import Project, Transformer

Mode = Literal["merged", "mixed"]


class MergedCopies:
    """Merged weights of the adapters in use, one copy of each, shared by all lanes."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        # by slot and the bank's version: another adapter may take the slot
        self._copies: WeakValueDictionary[tuple[int, int], MergedWeights] = WeakValueDictionary()

    def get(self, slot: int) -> MergedWeights | None:
        """Return an adapter's merged weights, kept while anyone holds them; None for the base."""
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
    """Makes the ``Project`` of each step of a lane that runs ``Transformer.forward``.

    Args:
        bank: The adapters.
        merged: Merged weights of the adapters; None adds their updates to the base's results.
        model: The base, with the lane's ``invariant_products``.
    """

    def __init__(self, bank: AdapterBank, merged: MergedCopies | None, model: Transformer) -> None:
        self._bank = bank
        self._merged = merged
        self._model = model
        self._weights: dict[int, MergedWeights | None] = {}  # of the last step's adapters

    def clear(self) -> None:
        """Drop the merged weights of the last step."""
        self._weights = {}

    def of(self, segments: Sequence[Sequence[int]], num_kept: int) -> Project | None:
        """Return the projection of packed rows that are sorted by adapter.

        Args:
            segments: Slot, end of its packed rows and end of its kept rows, for each adapter.
            num_kept: Number of kept rows, with the copies of the last one behind it.
        """
        if self._merged is None:
            slots, ends, _ = torch.tensor([[0, 0, 0], *segments]).unbind(1)
            return self._bank.mixed(slots[1:].repeat_interleave(ends.diff()), self._model)
        self._weights = {
            slot: self._weights[slot] if slot in self._weights else self._merged.get(slot)
            for slot, _, _ in segments
        }
        spans = [_MergedSpan(self._weights[slot], end, kept) for slot, end, kept in segments]
        spans[-1] = spans[-1]._replace(kept_end=num_kept)
        return _MergedSpans(self._model, spans)


class Spans:
    """Makes the spans of each step of a lane that runs ``NativeDecoder``; see ``Projections``."""

    def __init__(self, bank: AdapterBank, merged: MergedCopies | None) -> None:
        self._bank = bank
        self._merged = merged
        # of the last step's adapters; holding merged weights lets other lanes find them
        self._held: dict[int, tuple[MergedWeights | None, AdapterPatch | None]] = {}

    def clear(self) -> None:
        """Drop the merged weights of the last step."""
        self._held = {}

    def of(self, segments: Sequence[Sequence[int]], num_kept: int) -> list[Span]:
        """Return the spans of packed rows that are sorted by adapter; see ``Projections.of``."""
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
        assert merged is not None, "every adapter has merged weights"
        return merged, AdapterPatch(model, merged.weights)


class _MergedSpan(NamedTuple):
    """Packed rows of one adapter."""

    merged: MergedWeights | None  # None: the base
    end: int
    kept_end: int


class _MergedSpans:
    """``Project`` of rows of several adapters, each multiplied by its own merged weights."""

    def __init__(self, model: Transformer, spans: Sequence[_MergedSpan]) -> None:
        self._model = model
        self._spans = spans

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        products, begin = [], 0
        for merged, packed_end, kept_end in self._spans:
            end = packed_end if rows is None else kept_end
            if end > begin:
                weight = merged.weights.get((layer, name)) if merged else None
                products.append(self._model.linear(layer, name, x[begin:end], weight))
            begin = end
        return products[0] if len(products) == 1 else torch.cat(products)
