"""The table of tiles: what it says of a batch, what it refuses, and that an update keeps it."""

import random
from typing import Any

import pytest
import torch

from fastsafe_kernels._segments import BASE, WHOLE, Segments, example_ids, worst_case


def sorted_ids(seed: int) -> tuple[list[int], int]:
    """A random batch and its number of slots; base rows are anywhere among the runs."""
    rng = random.Random(seed)
    slots = rng.randrange(1, 7)
    ids: list[int] = []
    for slot in rng.sample(range(BASE, slots), rng.randrange(1, slots + 1)):
        ids += [slot] * rng.choice([1, 15, 16, 17, 40])
    return ids, slots


def tiles(segments: Segments) -> list[tuple[int, int, int]]:
    """First row, rows and slot of the entries in use."""
    return [(row0, rows, slot) for row0, rows, slot, _ in segments.table.tolist() if rows]


def test_a_batch_is_cut_at_its_adapters() -> None:
    segments = Segments.build([-1] * 3 + [0] * 20 + [4] * 16 + [2], num_slots=5, capacity=6)
    assert segments.table.tolist() == [
        [0, 3, -1, 0],
        [3, 16, 0, WHOLE],
        [19, 4, 0, WHOLE],
        [23, 16, 4, WHOLE],
        [39, 1, 2, WHOLE],
        [0, 0, -1, 0],
    ]
    assert segments.spans.tolist() == [[1, 2], [0, 0], [4, 1], [0, 0], [3, 1]]
    assert segments.runs() == [(3, 23, 0), (39, 40, 2), (23, 39, 4)]
    assert segments.table.dtype == segments.spans.dtype == torch.int32


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_tile_of_its_own_adapter(seed: int) -> None:
    ids, slots = sorted_ids(seed)
    segments = Segments.build(torch.tensor(ids), slots, 16)
    rows = [row for row0, count, _ in tiles(segments) for row in range(row0, row0 + count)]
    assert rows == list(range(len(ids)))
    assert all(set(ids[row0 : row0 + n]) == {slot} for row0, n, slot in tiles(segments))


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_of_an_adapter_depends_on_its_own_rows_alone(seed: int) -> None:
    ids, slots = sorted_ids(seed)
    segments = Segments.build(ids, slots, 32)
    for begin, end, slot in segments.runs():
        alone = Segments.build([slot] * (end - begin), slots, 32)
        own = [(row0 - begin, n, s) for row0, n, s in tiles(segments) if s == slot]
        assert own == tiles(alone)


@pytest.mark.parametrize(("rows", "slots"), [(0, 3), (1, 3), (5, 3), (37, 3), (160, 1), (9, 0)])
def test_the_default_capacity_fits_any_batch_and_no_less_would_do(rows: int, slots: int) -> None:
    runs = min(slots + 1, rows)
    # one row for each but the last, and there is one tile more than the rest fills
    ids = list(range(BASE, runs - 2)) + [runs - 2] * (rows - runs + 1) * bool(rows)
    segments = Segments.build(ids, slots)
    assert len(tiles(segments)) == segments.capacity == worst_case(rows, slots, 16)


def test_an_update_keeps_the_memory() -> None:
    segments = Segments.build([0] * 8, num_slots=4)
    table, spans = segments.table.data_ptr(), segments.spans.data_ptr()
    segments.update([-1, 0, 1, 1, 2, 2, 3, 3], ranks=[4, 8, 16, 32])
    assert (segments.table.data_ptr(), segments.spans.data_ptr()) == (table, spans)
    assert tiles(segments) == [(0, 1, -1), (1, 1, 0), (2, 2, 1), (4, 2, 2), (6, 2, 3)]
    assert segments.table[:, 3].tolist() == [0, 4, 8, 16, 32]
    segments.update([-1] * 8)
    assert tiles(segments) == [(0, 8, -1)]
    assert segments.spans.tolist() == [[0, 0]] * 4


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (
            [0, 1, 0],
            {},
            "Segments: slot 0 has rows at 0 and again at 2, expected one run; "
            "sort the rows by adapter",
        ),
        (
            [-1, 0, -1],
            {},
            "Segments: slot -1 has rows at 0 and again at 2, expected one run; "
            "sort the rows by adapter",
        ),
        ([0, 3], {}, "Segments: adapter_ids[1] is 3, expected [0, 3) or -1"),
        ([-2, 0], {}, "Segments: adapter_ids[0] is -2, expected [0, 3) or -1"),
        (
            [0] * 17 + [1],
            {"capacity": 2},
            "Segments: 18 rows make 3 tiles of 16, capacity is 2; any batch fits into 4",
        ),
        ([0], {"ranks": [8]}, "Segments: ranks has 1 entries, expected one per slot, 3"),
        ([0], {"block_m": 24}, "Segments: block_m is 24, expected a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(
    ids: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared whole
        Segments.build(ids, 3, **options)
    assert str(caught.value) == message


def test_a_refused_update_leaves_the_table_as_it_was() -> None:
    segments = Segments.build([0, 1], num_slots=2)
    before = segments.table.clone(), segments.spans.clone()
    message = (
        "Segments: adapter_ids has 1 rows, expected 2 as built; give rows without a use slot -1"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared whole
        segments.update([0])
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"expected \[0, 2\) or -1"):
        segments.update([1, 2])
    assert torch.equal(segments.table, before[0])
    assert torch.equal(segments.spans, before[1])


def test_example_batches_have_what_their_points_promise() -> None:
    assert example_ids(6, 3, base=0) == [0, 0, 1, 1, 2, 2]
    live = example_ids(40, 4, base=4)
    assert live[:4] == [BASE] * 4
    counts = [live.count(slot) for slot in range(4)]
    assert counts == [*sorted(counts[:3]), 0]
    assert counts[0] > 0
