"""The table of the adapters' rows in a batch, which grouped LoRA kernels walk.

The rows of a batch are sorted by adapter. Each adapter's run of rows is cut into tiles of at most
``block_m`` rows, counted from its own first row, so that no tile holds rows of two adapters and
the cut of one adapter is a function of its own number of rows. A kernel launches one program per
table entry, used or not: a CUDA graph captured once replays whatever the table says by then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = -1  # slot of rows without an adapter
WHOLE = 2**31 - 1  # rank of an adapter whose storage is read to its end
TILES = (16, 32, 64, 128)  # rows of a tile that is one operand of tl.dot

# Columns of the targets of fused projections, by the number that test and benchmark points name:
# awkward ones, then o and down, qkv, and gate_up of Llama-3.1-8B.
PARTS = (
    ((0, 1),),
    ((0, 40), (44, 111)),
    ((0, 17), (17, 34), (34, 310)),
    ((0, 4096),),
    ((0, 4096), (4096, 5120), (5120, 6144)),
    ((0, 14_336), (14_336, 28_672)),
)


@dataclass(frozen=True, eq=False)
class Segments:
    """Table of tiles; made by ``build``, rewritten in place by ``update``.

    Attributes:
        table: [capacity, 4] int32, contiguous: first row, rows, slot, rank. Entries are in row
            order; together they hold every row of the batch once, base rows with slot -1. Entries
            behind the last are 0, 0, -1, 0.
        spans: [num_slots, 2] int32, contiguous: first entry and number of entries of each slot;
            0, 0 for a slot without rows.
        num_rows: Rows of the batch.
        block_m: Most rows of a tile.
    """

    table: Tensor
    spans: Tensor
    num_rows: int
    block_m: int

    @classmethod
    def build(
        cls,
        adapter_ids: Sequence[int] | Tensor,
        num_slots: int,
        block_m: int = 16,
        *,
        capacity: int | None = None,
        ranks: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Segments":
        """Cut a batch into tiles.

        Args:
            adapter_ids: [num_rows] integers on the host: slot of each row in [0, num_slots), -1 =
                base only. Rows of one slot, and base rows, are one run each.
            num_slots: Adapters that the stacked weights hold.
            block_m: Most rows of a tile. 16 for decode and 64 or 128 for prefill and training;
                the reductions over rows of the backward take larger tiles, such as 1024.
            capacity: Entries of the table; what any batch of num_rows rows fits in when None.
            ranks: Rank of each slot's adapter, for storage that is padded to a larger one: what
                lies behind is zero and is not read. None reads all of it.
            device: Where the kernels run.

        Raises:
            ValueError: The rows are not sorted, a slot does not exist, or capacity is too small.

        Example:
            >>> Segments.build([-1, 0, 0, 2], num_slots=3, block_m=16).table[:, :3].tolist()
            [[0, 1, -1], [1, 2, 0], [3, 1, 2], [0, 0, -1]]
        """
        if block_m < 16 or block_m % 16:
            raise ValueError(f"Segments: block_m is {block_m}, expected a multiple of 16")
        num_rows = len(adapter_ids)
        if capacity is None:
            capacity = worst_case(num_rows, num_slots, block_m)
        table = torch.empty(capacity, 4, dtype=torch.int32, device=device)
        spans = torch.empty(num_slots, 2, dtype=torch.int32, device=device)
        segments = cls(table, spans, num_rows, block_m)
        segments.update(adapter_ids, ranks)
        return segments

    @property
    def capacity(self) -> int:
        """Entries of the table, used or not."""
        return self.table.shape[0]

    @property
    def num_slots(self) -> int:
        """Adapters that the stacked weights hold."""
        return self.spans.shape[0]

    def update(
        self, adapter_ids: Sequence[int] | Tensor, ranks: Sequence[int] | None = None
    ) -> None:
        """Describe another batch of as many rows in the same memory.

        Kernels queued before it see the old table and those queued after it the new one, as with
        any copy to the device; a captured graph sees the new one at its next replay.

        Args:
            adapter_ids: [num_rows] integers on the host, as for ``build``; rows without a use are
                base rows.
            ranks: As for ``build``.

        Raises:
            ValueError: As ``build`` does, or the number of rows differs. The table is untouched.
        """
        if len(adapter_ids) != self.num_rows:
            raise ValueError(
                f"Segments: adapter_ids has {len(adapter_ids)} rows, expected {self.num_rows} as "
                f"built; give rows without a use slot {BASE}"
            )
        if ranks is not None and len(ranks) != self.num_slots:
            raise ValueError(
                f"Segments: ranks has {len(ranks)} entries, expected one per slot, {self.num_slots}"
            )
        rows: list[list[int]] = []
        spans = [[0, 0] for _ in range(self.num_slots)]
        for row0, count, slot in _runs(adapter_ids, self.num_slots):
            rank = 0 if slot == BASE else WHOLE if ranks is None else ranks[slot]
            tiles = range(0, count, self.block_m)
            if slot != BASE:
                spans[slot] = [len(rows), len(tiles)]
            rows += [[row0 + at, min(self.block_m, count - at), slot, rank] for at in tiles]
        if len(rows) > self.capacity:
            raise ValueError(
                f"Segments: {self.num_rows} rows make {len(rows)} tiles of {self.block_m}, "
                f"capacity is {self.capacity}; any batch fits into "
                f"{worst_case(self.num_rows, self.num_slots, self.block_m)}"
            )
        rows += [[0, 0, BASE, 0]] * (self.capacity - len(rows))
        self.table.copy_(torch.tensor(rows, dtype=torch.int32).view(-1, 4))
        self.spans.copy_(torch.tensor(spans, dtype=torch.int32).view(-1, 2))

    def runs(self) -> list[tuple[int, int, int]]:
        """Return the first row, end and slot of each adapter's rows; waits for the device."""
        table, runs = self.table.tolist(), []
        for slot, (first, tiles) in enumerate(self.spans.tolist()):
            if tiles:
                row0, last = table[first][0], table[first + tiles - 1]
                runs.append((row0, last[0] + last[1], slot))
        return runs

    def check(
        self,
        op: str,
        rows: tuple[str, Tensor],
        slots: tuple[str, Tensor] | None,
        tiles: tuple[int, ...] = (),
    ) -> None:
        """Raise ValueError if the table is not one for these tensors, named for the message.

        Args:
            op: Name of the caller, for the message.
            rows: Tensor with one row per row of the batch.
            slots: Weights stacked by slot, or None.
            tiles: Tile sizes that the caller takes; any when empty.
        """
        name, x = rows
        if x.device != self.table.device:
            devices = f"{self.table.device}, expected {x.device} like {name}"
            raise ValueError(f"{op}: segments is on {devices}")
        if x.shape[0] != self.num_rows:
            expected = f"expected {self.num_rows} as in segments"
            raise ValueError(f"{op}: {name} has {x.shape[0]} rows, {expected}")
        if slots and slots[1].shape[0] != self.num_slots:
            expected = f"expected {self.num_slots} as in segments"
            raise ValueError(f"{op}: {slots[0]} has {slots[1].shape[0]} slots, {expected}")
        if tiles and self.block_m not in tiles:
            sizes = " or ".join(map(str, tiles))
            raise ValueError(f"{op}: segments has tiles of {self.block_m} rows, expected {sizes}")


def worst_case(num_rows: int, num_slots: int, block_m: int) -> int:
    """Return the largest number of tiles of a batch: each run has one that is not full."""
    runs = min(num_slots + 1, num_rows)
    return runs + (num_rows - runs) // block_m


def check_parts(
    op: str, parts: Sequence[tuple[int, int]], out_features: int, rank: tuple[str, int, int]
) -> None:
    """Raise ValueError unless ``parts`` are the columns of a fused projection's targets.

    Args:
        op: Name of the caller, for the message.
        parts: First column and end of each target.
        out_features: Columns of the projection.
        rank: Name and number of the columns that hold every target's ranks, and ranks per target.
    """
    end = 0
    for part in parts:
        if not end <= part[0] < part[1] <= out_features:
            raise ValueError(
                f"{op}: parts is {tuple(parts)}, expected (begin, end) pairs that rise within "
                f"[0, {out_features}]"
            )
        end = part[1]
    name, columns, r = rank
    if columns != len(parts) * r:
        raise ValueError(
            f"{op}: {name} has {columns} columns, expected {len(parts) * r} for {len(parts)} parts"
            f" of rank {r}"
        )


def example_ids(num_rows: int, num_slots: int, base: int) -> list[int]:
    """Slots of the rows of a test or benchmark batch.

    Args:
        num_rows: Rows.
        num_slots: Slots.
        base: Base rows. With none, the slots share the rows evenly; with some, as in a live
            batch, the first slots have few rows, the later ones many, and the last none.
    """
    present = num_slots if base == 0 else max(1, num_slots - 1)
    rows = num_rows - base
    power = 1 if base == 0 else 2
    cuts = [rows * i**power // present**power for i in range(present + 1)]
    ids = [BASE] * base
    for slot in range(present):
        ids += [slot] * (cuts[slot + 1] - cuts[slot])
    return ids


def _runs(adapter_ids: Sequence[int] | Tensor, num_slots: int) -> list[tuple[int, int, int]]:
    """Return the first row, number of rows and slot of each run of equal ids."""
    ids = torch.as_tensor(adapter_ids, dtype=torch.int64, device="cpu")
    slots, counts = torch.unique_consecutive(ids, return_counts=True)
    runs: list[tuple[int, int, int]] = []
    seen: dict[int, int] = {}
    row0 = 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if not BASE <= slot < num_slots:
            raise ValueError(
                f"Segments: adapter_ids[{row0}] is {slot}, expected [0, {num_slots}) or {BASE}"
            )
        if slot in seen:
            raise ValueError(
                f"Segments: slot {slot} has rows at {seen[slot]} and again at {row0}, expected one "
                "run; sort the rows by adapter"
            )
        seen[slot] = row0
        runs.append((row0, count, slot))
        row0 += count
    return runs
