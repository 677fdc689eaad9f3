"""Linear layers of one step: each row's adapter, mixed in or merged into the weights."""

import threading
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastsafe.model.cpu_decoder import AdapterPatch, Span, runs_natively
from fastsafe.model.lora import BASE, AdapterBank, MergedWeights
from fastsafe.model.transformer import Project, Transformer


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
                weights = MergedWeights(self._bank.model, self._bank.updates(slot))
                self._copies[key] = weights
            return weights


class StepAdapters:
    """Adapters of each step of a lane, kept for the next step.

    Args:
        bank: The adapters.
        merged: Merged weights of the adapters; None adds their updates to the base's results.
        model: The base, with the lane's ``invariant_products``.
    """

    def __init__(self, bank: AdapterBank, merged: MergedCopies | None, model: Transformer) -> None:
        self._bank = bank
        self._merged = merged
        self._model = model
        self._is_native = runs_natively(model)
        # of the last step's adapters; holding merged weights lets other lanes find them
        self._held: dict[int, tuple[MergedWeights | None, AdapterPatch | None]] = {}

    def clear(self) -> None:
        """Drop the merged weights of the last step."""
        self._held = {}

    def project(self, segments: Sequence[Sequence[int]]) -> Project | None:
        """Return the projection of packed rows that are sorted by adapter.

        Args:
            segments: Slot, end of its packed rows and end of its kept rows, for each adapter.
        """
        if self._merged is None:
            slots, ends, _ = torch.tensor([[0, 0, 0], *segments]).unbind(1)
            return self._bank.mixed(slots[1:].repeat_interleave(ends.diff()), self._model)
        self._hold(segments)
        spans = [(self._held[slot][0], end, kept_end) for slot, end, kept_end in segments]
        return _MergedSpans(self._model, spans)

    def spans(self, segments: Sequence[Sequence[int]]) -> list[Span]:
        """Return the spans of packed rows for ``NativeDecoder``; see ``project``."""
        self._hold(segments)
        return [Span(self._held[slot][1], end, kept_end) for slot, end, kept_end in segments]

    def _hold(self, segments: Sequence[Sequence[int]]) -> None:
        self._held = {slot: self._held.get(slot) or self._make(slot) for slot, _, _ in segments}

    def _make(self, slot: int) -> tuple[MergedWeights | None, AdapterPatch | None]:
        merged = self._merged.get(slot) if self._merged else None
        if slot == BASE or not self._is_native:
            return merged, None
        if merged is None:
            return None, AdapterPatch(self._model, updates=self._bank.updates(slot))
        return merged, AdapterPatch(self._model, merged.weights)


class _MergedSpans:
    """``Project`` of rows of several adapters, each multiplied by its own merged weights."""

    def __init__(
        self, model: Transformer, spans: Sequence[tuple[MergedWeights | None, int, int]]
    ) -> None:
        self._model = model
        self._spans = spans  # weights (None: the base), end of packed rows and of kept rows

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        products, begin = [], 0
        for merged, packed_end, kept_end in self._spans:
            end = packed_end if rows is None else kept_end
            if end > begin:
                weight = merged.weights.get((layer, name)) if merged else None
                products.append(self._model.linear(layer, name, x[begin:end], weight))
            begin = end
        return products[0] if len(products) == 1 else torch.cat(products)
