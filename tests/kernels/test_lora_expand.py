"""lora_expand: base rows keep their bits, other rows have theirs in any company."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._segments import BASE, Segments
from fastsafe_kernels._spec import runs_reference
from fastsafe_kernels.lora_expand import lora_expand
from fastsafe_kernels.lora_shrink import lora_shrink

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [-1] * 3 + [0] * 19 + [3] * 2 + [1] * 5
PARTS = ((0, 40), (44, 100))  # columns 40..43 and 100..109 belong to no target
O, RANK = 110, 5


def example(device: str, ids: list[int] = IDS) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """y, shrunk, lora_B and the table of a batch."""
    torch.manual_seed(1)
    lora_B = torch.randn(4, O, RANK, device=device)
    y = torch.randn(len(ids), O, device=device)
    shrunk = torch.randn(len(ids), len(PARTS) * RANK, device=device)
    return y, shrunk, lora_B, Segments.build(ids, 4, device=device)


def expanded(y: Tensor, *args: Any, **options: Any) -> Tensor:
    """What ``lora_expand`` makes of a copy of ``y``."""
    y = y.clone()
    lora_expand(y, *args, **options)
    return y


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit from the kernel; torch's matmul on a CPU promises nothing about bits."""
    return torch.allclose(a, b, 1e-4, 1e-4) if runs_reference(a) else torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_each_row_gets_the_update_of_its_own_adapter(device: str) -> None:
    y, shrunk, lora_B, segments = example(device)
    dense = torch.zeros(4, O, len(PARTS) * RANK, device=device)  # with its zero blocks
    for t, (begin, end) in enumerate(PARTS):
        dense[:, begin:end, t * RANK : (t + 1) * RANK] = lora_B[:, begin:end]
    expected = y.clone()
    for m, slot in enumerate(IDS):
        if slot != BASE:
            expected[m] += dense[slot] @ shrunk[m]
    torch.testing.assert_close(expanded(y, shrunk, lora_B, segments, PARTS), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_base_rows_and_columns_of_no_part_keep_their_bits(device: str) -> None:
    y, shrunk, lora_B, segments = example(device)
    y[:3] = float("nan")
    y[:, 40:44] = -0.0  # -0.0 + 0.0 would be 0.0
    after = expanded(y, shrunk, lora_B, segments, PARTS)
    assert torch.equal(after[:3].view(torch.int32), y[:3].view(torch.int32))
    assert torch.equal(after[:, 40:44].view(torch.int32), y[:, 40:44].view(torch.int32))
    assert torch.equal(after[3:, 100:], y[3:, 100:])
    assert (after[3:, 44:100] != y[3:, 44:100]).any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_has_the_same_bits_in_any_company(device: str) -> None:
    y, shrunk, lora_B, segments = example(device)
    together = expanded(y, shrunk, lora_B, segments, PARTS)
    for begin, end, slot in segments.runs():
        alone = Segments.build([slot] * (end - begin), 4, device=device)
        own = slice(begin, end)
        assert same(expanded(y[own], shrunk[own], lora_B, alone, PARTS), together[own])
    order = [m for s in (1, 0, -1, 3) for m in range(len(IDS)) if IDS[m] == s]
    moved = Segments.build([IDS[m] for m in order], 4, capacity=20, device=device)
    assert same(expanded(y[order], shrunk[order], lora_B, moved, PARTS), together[order])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_beside_other_rows(device: str) -> None:
    y, shrunk, lora_B, segments = example(device, [2] * 21)
    together = expanded(y, shrunk, lora_B, segments, PARTS)
    others = torch.randn(34, shrunk.shape[1], device=device)
    others[:21:2] = shrunk[::2]
    longer = Segments.build([2] * 34, 4, device=device)
    y_longer = torch.cat([y, y[:13]])
    assert same(expanded(y_longer, others, lora_B, longer, PARTS)[:21:2], together[::2])
    if device == "cuda":  # interpreted, a tile is numpy's product, whose rows are not all alike
        order = torch.randperm(21, device=device)
        moved = expanded(y[order], shrunk[order], lora_B, segments, PARTS)
        assert torch.equal(moved, together[order])


@pytest.mark.parametrize("device", DEVICES)
def test_an_updated_table_takes_more_adapters_in_the_same_launch(device: str) -> None:
    y, shrunk, lora_B, _ = example(device)
    segments = Segments.build([0] * len(IDS), 4, device=device)
    first = expanded(y, shrunk, lora_B, segments, PARTS)
    segments.update(IDS)
    now = expanded(y, shrunk, lora_B, segments, PARTS)
    fresh = Segments.build(IDS, 4, device=device)
    assert torch.equal(now, expanded(y, shrunk, lora_B, fresh, PARTS))
    assert not torch.equal(now, first)


@pytest.mark.gpu
def test_a_captured_graph_replays_any_number_of_adapters() -> None:
    """Captured with one adapter; replayed with 2, 17 and all (sglang#28371 dropped the rest)."""
    M, I, slots, rank = 256, 512, 32, 16
    x = torch.randn(M, I, device="cuda", dtype=torch.bfloat16)
    A = torch.randn(slots, 2 * rank, I, device="cuda", dtype=torch.bfloat16)
    B = torch.randn(slots, O, rank, device="cuda", dtype=torch.bfloat16)
    segments = Segments.build([0] * M, slots, device="cuda")
    y = torch.zeros(M, O, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        y.zero_()
        lora_expand(y, lora_shrink(x, A, segments, 2), B, segments, PARTS)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for present in (1, 2, 17, slots):
        segments.update(sorted(m % (present + 1) - 1 for m in range(M)))
        graph.replay()
        replayed = y.clone()
        step()
        assert torch.equal(replayed, y)
        assert int((y != 0).any(1).sum()) == sum(end - begin for begin, end, _ in segments.runs())


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_ranks_are_those_of_the_adapters_alone(device: str) -> None:
    """Capacity 20; whole groups of 8 ranks behind an adapter's own are not read."""
    ranks, r = [20, 3, 8, 16], 20
    _, _, _, segments = example(device)
    torch.manual_seed(3)
    y, shrunk = torch.randn(len(IDS), O, device=device), torch.randn(len(IDS), 2 * r, device=device)
    lora_B = torch.randn(4, O, r, device=device)
    own = torch.tensor([[k < rank for k in range(r)] for rank in ranks], device=device)[:, None]
    groups = torch.tensor([[k < -(-rank // 8) * 8 for k in range(r)] for rank in ranks])
    padded = torch.where(own, lora_B, 0.0)
    expected = expanded(y, shrunk, padded, segments, PARTS)
    segments = Segments.build(IDS, 4, ranks=ranks, device=device)
    assert torch.equal(expanded(y, shrunk, padded, segments, PARTS), expected)
    if not runs_reference(y):
        dirty = torch.where(groups[:, None].to(device), padded, float("nan"))
        assert torch.equal(expanded(y, shrunk, dirty, segments, PARTS), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_lora_a_in_the_role_of_b_is_the_gradient_of_the_input(device: str) -> None:
    """dX += dS A: ranks of two targets are stacked, each with its own ragged end."""
    torch.manual_seed(4)
    I, r, ranks = 70, 9, [9, 2, 9, 4]
    _, _, _, segments = example(device)
    own = torch.tensor([[k % r < rank for k in range(2 * r)] for rank in ranks], device=device)
    lora_A = torch.where(own[..., None], torch.randn(4, 2 * r, I, device=device), 0.0)
    dS = torch.randn(len(IDS), 2 * r, device=device)
    dX = torch.randn(len(IDS), I, device=device)
    expected = dX.clone()
    for m, slot in enumerate(IDS):
        if slot != BASE:
            expected[m] += dS[m] @ lora_A[slot]
    segments = Segments.build(IDS, 4, ranks=ranks, device=device)
    lora_expand(dX, dS, lora_A.transpose(1, 2), segments, ((0, I),), targets=2)
    torch.testing.assert_close(dX, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor(device: str) -> None:
    y, shrunk, lora_B, segments = example(device)
    expected = expanded(y, shrunk, lora_B, segments, PARTS)
    wide, wide_shrunk = (
        torch.zeros(len(IDS), 150, device=device),
        torch.zeros(29, 17, device=device),
    )
    wide[:, 20:130], wide_shrunk[:, 3:13] = y, shrunk
    lora_expand(wide[:, 20:130], wide_shrunk[:, 3:13], lora_B, segments, PARTS)
    assert same(wide[:, 20:130], expected)
    assert (wide[:, :20] == 0).all()
    assert (wide[:, 130:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    y, shrunk, lora_B, segments = example(device, [])
    assert expanded(y, shrunk, lora_B, segments, PARTS).shape == (0, O)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"y": lambda y: y[:5], "shrunk": lambda s: s[:5]},
            ValueError,
            "lora_expand: y has 5 rows, expected 29 as in segments",
        ),
        (
            {"shrunk": lambda s: s[:5]},
            ValueError,
            "lora_expand: shrunk is [5, 10], expected [M, R] with M=29 from y",
        ),
        (
            {"shrunk": lambda s: s.double()},
            TypeError,
            "lora_expand: shrunk is torch.float64, expected float32",
        ),
        (
            {"lora_B": lambda B: B[:3]},
            ValueError,
            "lora_expand: lora_B has 3 slots, expected 4 as in segments",
        ),
        (
            {"lora_B": lambda B: torch.cat([B, B], 2)[..., ::2]},
            ValueError,
            "lora_expand: lora_B has strides [10, 2] in O and r, expected 1 in one of them; "
            "call .contiguous()",
        ),
        (
            {"y": lambda y: y.T.contiguous().T},
            ValueError,
            "lora_expand: y has stride 29 in O, expected 1; call .contiguous()",
        ),
        (
            {"parts": lambda _: ((0, 40), (30, 100))},
            ValueError,
            "lora_expand: parts is ((0, 40), (30, 100)), expected (begin, end) pairs that rise "
            "within [0, 110]",
        ),
        (
            {"parts": lambda _: ((0, 40), (44, 111))},
            ValueError,
            "lora_expand: parts is ((0, 40), (44, 111)), expected (begin, end) pairs that rise "
            "within [0, 110]",
        ),
        (
            {"parts": lambda _: ((0, 40),)},
            ValueError,
            "lora_expand: shrunk has 10 columns, expected 5 for 1 parts of rank 5",
        ),
        (
            {"targets": lambda _: 2},
            ValueError,
            "lora_expand: targets is 2, expected a divisor of r=5",
        ),
        (
            {"segments": lambda _: Segments.build(IDS, 4, 256)},
            ValueError,
            "lora_expand: segments has tiles of 256 rows, expected 16 or 32 or 64 or 128",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("y", "shrunk", "lora_B", "segments")
    args: dict[str, Any] = dict(zip(names, example("cpu"), strict=True))
    args |= {"parts": PARTS, "targets": 1}
    args |= {name: alter(args[name]) for name, alter in change.items()}
    with pytest.raises(error) as caught:
        lora_expand(*args.values())
    assert str(caught.value) == message
