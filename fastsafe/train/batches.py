"""Sample the rows of each step and pack them into tiles.

A tile is the input of one forward and backward pass: whole sequences of one job's batch. It is made
of parts, which run one after another where memory is short; on a CPU with the same bits.
"""

import math
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsafe.data.packing import TrainExample
from fastsafe.errors import UsageError
from fastsafe.model.attention import PackedAttention

# Rows that a batch is drawn from: "safety" are those with that value under the key "source", "user"
# are all others, and "all" are both in their order.
RowSource = Literal["all", "user", "safety"]

# Tokens of a tile. Smaller ones stay in a core's L2 cache, but their many short operations queue
# for the interpreter's lock: 640 took 15 % less time than 320. A GPU wants few large launches.
TILE_TOKENS = {"cpu": 640, "cuda": 16384}
_PARTS = 4  # of a tile, at most


class Tile(NamedTuple):
    """Whole sequences of one batch, in parts, and the counts that normalize their loss."""

    source: RowSource
    parts: tuple[tuple[TrainExample, ...], ...]
    num_trained: int  # tokens in the whole batch
    num_rows: int  # in the whole batch
    seed: int  # of dropout


class Packed(NamedTuple):
    """Sequences concatenated without padding."""

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    attention: PackedAttention
    keep: Tensor  # [M] rows whose next token is trained
    targets: Tensor  # [M] int64
    answer_index: Tensor  # [M] int64, index of the target in its answer, from 0
    rows: tuple[int, ...]  # of N, in each part
    kept: tuple[int, ...]  # of M, in each part


class BatchSampler:
    """Batches of one source's rows, epoch after epoch; shuffling permutes each epoch anew."""

    def __init__(
        self, examples: Sequence[TrainExample], batch_size: int, seed: int, shuffle: bool
    ) -> None:
        self.examples = examples
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._generator = random.Random(seed)
        self._order = list(range(len(examples)))
        self._at = len(examples)

    def next(self) -> list[TrainExample]:
        """Return the next batch; the last one of an epoch may be smaller."""
        if self._at >= len(self._order):
            self._at = 0
            if self._shuffle:
                self._generator.shuffle(self._order)
        begin, self._at = self._at, self._at + self._batch_size
        return [self.examples[i] for i in self._order[begin : self._at]]


def make_tiles(
    batch: Sequence[TrainExample], source: RowSource, tile_tokens: int, *seeds: int
) -> list[Tile]:
    """Split a batch into tiles of about equal size; each is seeded by ``seeds`` and its index."""
    # the first token of a sequence is no target: nothing comes before it
    trained = sum(sum(e.trained[1:]) for e in batch)
    ordered = sorted(batch, key=lambda e: len(e.token_ids))
    total = sum(len(e.token_ids) for e in batch)
    groups = _groups(ordered, math.ceil(total / tile_tokens))
    return [
        Tile(
            source, tuple(map(tuple, _groups(g, _PARTS))), trained, len(batch), hash_seed(*seeds, i)
        )
        for i, g in enumerate(groups)
    ]


def _groups(examples: Sequence[TrainExample], count: int) -> list[list[TrainExample]]:
    """Split into at most ``count`` groups of about equal numbers of tokens, none empty."""
    total = sum(len(e.token_ids) for e in examples)
    groups: list[list[TrainExample]] = [[] for _ in range(count)]
    assigned = 0
    for example in examples:
        groups[min(count - 1, assigned * count // total)].append(example)
        assigned += len(example.token_ids)
    return [group for group in groups if group]


def pack(parts: Sequence[Sequence[TrainExample]], device: torch.device) -> Packed:
    """Pack the sequences of ``parts`` in their order."""
    examples = [e for part in parts for e in part]
    # the last token of a sequence predicts nothing
    lengths = [len(e.token_ids) - 1 for e in examples]
    next_tokens = [t for e in examples for t in e.token_ids[1:]]
    trained = [t for e in examples for t in e.trained[1:]]
    keep = [i for i, is_trained in enumerate(trained) if is_trained]
    answer_index = [i for e in examples for i in answer_indices(e)]
    return Packed(
        torch.tensor([t for e in examples for t in e.token_ids[:-1]], device=device),
        torch.cat([torch.arange(n) for n in lengths]).to(device),
        PackedAttention(lengths),
        torch.tensor(keep, device=device),
        torch.tensor([next_tokens[i] for i in keep], device=device),
        torch.tensor(answer_index, device=device),
        tuple(sum(len(e.token_ids) - 1 for e in part) for part in parts),
        tuple(sum(sum(e.trained[1:]) for e in part) for part in parts),
    )


def answer_indices(example: TrainExample) -> list[int]:
    """Return the index of every trained token in its answer, a run of trained tokens.

    The first token of the sequence is left out: nothing predicts it.
    """
    indices, index = [], 0
    for i, is_trained in enumerate(example.trained):
        if is_trained and i:
            indices.append(index)
        index = index + 1 if is_trained else 0
    return indices


def hash_seed(*parts: int) -> int:
    """Hash integers to a 63-bit seed (FNV-1a, Fowler et al. 1991)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in (part & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 1


def check_lengths(name: str, rows: Sequence[TrainExample], limit: int | None) -> None:
    """Refuse a job without rows, or with one of more tokens than the model takes."""
    if not rows:
        raise UsageError(f"job {name!r} has no rows")
    longest = max(len(row.token_ids) for row in rows)
    if limit is not None and longest > limit:
        raise UsageError(f"job {name!r} has a row of {longest} tokens, the model takes {limit}")
