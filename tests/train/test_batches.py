"""Orders, tiles and packing; and the sums that may be cut anywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data.packing import TrainExample
from fastsafe.model import cpu_ops
from fastsafe.train.batches import BatchSampler, hash_seed, make_tiles, pack

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def example(length: int, at: int = 0) -> TrainExample:
    ids = tuple((at + i) % 90 for i in range(length))
    return TrainExample(ids, tuple(i >= length // 2 for i in range(length)))


@given(lengths=LENGTHS, tile_tokens=st.sampled_from([50, 200, 640]))
def test_tiles_hold_every_row_once(lengths: list[int], tile_tokens: int) -> None:
    batch = [example(n, i) for i, n in enumerate(lengths)]
    tiles = make_tiles(batch, "all", tile_tokens, 7)
    rows = [e for tile in tiles for part in tile.parts for e in part]
    assert sorted(rows, key=id) == sorted(batch, key=id)
    assert all(tile.parts and all(tile.parts) for tile in tiles)
    trained = sum(sum(e.trained[1:]) for e in batch)
    assert {tile.num_trained for tile in tiles} == {trained}
    assert {tile.num_rows for tile in tiles} == {len(batch)}
    assert len({tile.seed for tile in tiles}) == len(tiles)
    largest = max(sum(len(e.token_ids) for p in t.parts for e in p) for t in tiles)
    assert largest <= tile_tokens + max(lengths)


@given(lengths=LENGTHS)
def test_packing_keeps_rows_and_targets(lengths: list[int]) -> None:
    parts = [[example(n, i)] for i, n in enumerate(lengths)]
    packed = pack(parts, torch.device("cpu"))
    assert packed.rows == tuple(n - 1 for n in lengths)
    assert sum(packed.kept) == len(packed.keep) == len(packed.targets) == len(packed.answer_index)
    # the token after a kept row is its target
    following = torch.tensor([t for (e,) in parts for t in e.token_ids[1:]])
    assert torch.equal(following[packed.keep], packed.targets)
    starts = torch.nonzero(packed.positions == 0)[:, 0].tolist()
    assert starts == [sum(packed.rows[:i]) for i in range(len(lengths))]


@given(count=st.integers(1, 30), batch=st.integers(1, 8), seed=st.integers(0, 2**80))
def test_an_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    examples = [example(4, i) for i in range(count)]
    order, again = (BatchSampler(examples, batch, seed, shuffle=True) for _ in range(2))
    for _ in range(3):
        seen = []
        while len(seen) < count:
            rows = order.next()
            assert rows == again.next()
            assert 1 <= len(rows) <= batch
            seen += rows
        assert sorted(seen, key=id) == sorted(examples, key=id)
    plain = BatchSampler(examples, batch, seed, shuffle=False)
    assert plain.next() == examples[:batch]


def test_seeds_depend_on_every_part() -> None:
    assert len({hash_seed(*parts) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2))}) == 5
    assert 0 <= hash_seed(2**200) < 2**63


@pytest.mark.skipif(cpu_ops.INTERPRET, reason="the interpreter takes the CPU's tensors")
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 70),
    depth=st.integers(2, 400),
    at=st.floats(0.01, 0.99),
)
def test_an_added_sum_may_be_cut_anywhere(rows: int, width: int, depth: int, at: float) -> None:
    """The bits of a gradient do not depend on where its rows are split."""
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, depth, generator=generator)
    w = torch.randn(width, depth, generator=generator)
    begin = torch.randn(rows, width, generator=generator)
    whole = cpu_ops.linear(x, w, accumulate_into=begin.clone())
    cut_at = max(1, int(at * depth))
    first = cpu_ops.linear(x[:, :cut_at], w[:, :cut_at], accumulate_into=begin.clone())
    assert torch.equal(cpu_ops.linear(x[:, cut_at:], w[:, cut_at:], accumulate_into=first), whole)
    exact = begin.double() + x.double() @ w.double().T
    torch.testing.assert_close(whole.double(), exact, rtol=1e-4, atol=1e-3)
