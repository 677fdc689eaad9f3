"""Mixed batches on a GPU: all adapters' updates of a fused linear in two launches."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe_kernels as ops
from fastsafe.model.transformer import Key, Transformer
from fastsafe_kernels import Segments
from fastsafe_kernels._segments import BASE, worst_case

# Rows of a tile: thin ones waste least of the matrix units while each adapter has few rows.
_DECODE_TILE, _PREFILL_TILE = 16, 64
_DECODE_ROWS = 2048

# Segments of the adapters' rows, and the order that sorts the rows by slot; None where they are.
_Rows = tuple[Segments, Tensor | None]


class ModuleUpdate(NamedTuple):
    """One adapter's update B A x of rows [begin, end) of a fused linear; scaling is in B."""

    begin: int
    end: int
    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [end - begin, R]


class _Stack(NamedTuple):
    """All adapters' updates of one fused linear, padded with zeros to one rank."""

    lora_A: Tensor  # [slots, targets * r, I]
    lora_B: Tensor  # [slots, O, r]
    parts: tuple[tuple[int, int], ...]  # output rows of each target


class AdapterStacks:
    """Updates of several adapters, stacked by slot; made once for a set of adapters.

    Args:
        model: The base.
        adapters: Per slot, the updates of every fused linear that the adapter touches; empty
            for a free slot.
    """

    def __init__(
        self, model: Transformer, adapters: Sequence[Mapping[Key, Sequence[ModuleUpdate]]]
    ) -> None:
        self.model = model
        self.num_slots = len(adapters)
        keys = dict.fromkeys(key for adapter in adapters for key in adapter)
        self.stacks = {key: _stack(model, key, [a.get(key, ()) for a in adapters]) for key in keys}

    def add_updates(
        self,
        y: Tensor,
        layer: int,
        name: str,
        x: Tensor,
        segments: Segments,
        order: Tensor | None,
    ) -> Tensor:
        """Add each row's own update to the base's product ``y`` of x; ``order`` sorts the rows."""
        stack = self.stacks.get((layer, name))
        if stack is None:
            return y
        x, to = (x, y) if order is None else (x[order], y[order])
        shrunk = ops.lora_shrink(x, stack.lora_A, segments, len(stack.parts))
        ops.lora_expand(to, shrunk, stack.lora_B, segments, stack.parts)
        if order is not None:
            y[order] = to
        return y


def _stack(model: Transformer, key: Key, slots: Sequence[Sequence[ModuleUpdate]]) -> _Stack:
    updates = [update for slot in slots for update in slot]
    parts = tuple(sorted({(u.begin, u.end) for u in updates}))
    rank = max(len(u.lora_A) for u in updates)
    weight = model.weight(*key)
    shape = len(slots), len(parts) * rank, weight.shape[1]
    lora_A = torch.zeros(shape, dtype=model.dtype, device=model.device)
    lora_B = torch.zeros(len(slots), weight.shape[0], rank, dtype=model.dtype, device=model.device)
    for i, slot in enumerate(slots):
        for u in slot:
            r0, r = parts.index((u.begin, u.end)) * rank, len(u.lora_A)
            lora_A[i, r0 : r0 + r] = u.lora_A
            lora_B[i, u.begin : u.end, :r] = u.lora_B
    return _Stack(lora_A, lora_B, parts)


class Grouped:
    """``Project`` of one batch whose rows have different adapters."""

    def __init__(self, stacks: AdapterStacks, ids: list[int], model: Transformer) -> None:
        self._stacks = stacks
        self._model = model
        self._ids = ids
        self._all = self._rows(ids)
        self._cached: tuple[Tensor, _Rows] | None = None  # the last ``rows`` and their table

    def _rows(self, ids: list[int]) -> _Rows:
        device = self._stacks.model.device
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        tile = _DECODE_TILE if len(ids) <= _DECODE_ROWS else _PREFILL_TILE
        segments = Segments.build(
            [ids[i] for i in order], self._stacks.num_slots, tile, device=device
        )
        is_sorted = order == list(range(len(ids)))
        return segments, None if is_sorted else torch.tensor(order, device=device)

    def _of(self, rows: Tensor | None) -> _Rows:
        if rows is None:
            return self._all
        if self._cached is None or self._cached[0] is not rows:
            self._cached = rows, self._rows([self._ids[i] for i in rows.tolist()])
        return self._cached[1]

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by the base's weight and add each row's own update; see ``Project``."""
        segments, order = self._of(rows)
        y = self._model.linear(layer, name, x)
        return self._stacks.add_updates(y, layer, name, x, segments, order)


class FixedRows:
    """``Project`` of steps of one size, whose table of rows stays at one address.

    A CUDA graph captured with it replays with the adapters that ``update`` set last.
    """

    def __init__(self, stacks: AdapterStacks, num_rows: int, model: Transformer) -> None:
        self.stacks = stacks
        self._model = model
        self._segments = Segments.build(
            [BASE] * num_rows,
            stacks.num_slots,
            _DECODE_TILE,
            device=stacks.model.device,
            capacity=worst_case(num_rows, stacks.num_slots, _DECODE_TILE),
        )

    def update(self, adapter_ids: Sequence[int]) -> None:
        """Describe the next step's rows, sorted by slot."""
        self._segments.update(adapter_ids)

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by the base's weight and add each row's own update; see ``Project``."""
        y = self._model.linear(layer, name, x)
        return self.stacks.add_updates(y, layer, name, x, self._segments, None)
