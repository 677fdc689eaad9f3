"""lora_shrink: rows keep their bits in any company; padding and base rows are inert."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._segments import Segments
from fastsafe_kernels._spec import runs_reference
from fastsafe_kernels.lora_shrink import SPLIT, lora_shrink

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [-1] * 3 + [0] * 19 + [3] * 2 + [1] * 5


def weights(device: str, slots: int = 4, R: int = 6, I: int = 70) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(slots, R, I, device=device)


def rows(device: str, M: int, I: int = 70) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(M, I, device=device)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit from the kernel; torch's matmul on a CPU promises nothing about bits."""
    return torch.allclose(a, b, 1e-4, 1e-4) if runs_reference(a) else torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_each_row_meets_its_own_adapter_and_base_rows_are_zero(device: str) -> None:
    x, A = rows(device, len(IDS)), weights(device)
    x[:3] = float("nan")
    y = lora_shrink(x, A, Segments.build(IDS, 4, device=device))
    expected = torch.stack([A[s] @ x[m] if s >= 0 else 0 * A[0, :, 0] for m, s in enumerate(IDS)])
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:3], torch.zeros_like(y[:3]))
    assert (y[3:] != 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("I", [70, SPLIT + 40])
def test_an_adapter_has_the_same_bits_in_any_company(device: str, I: int) -> None:
    x, A = rows(device, len(IDS), I), weights(device, I=I)
    together = lora_shrink(x, A, Segments.build(IDS, 4, device=device))
    for begin, end, slot in Segments.build(IDS, 4).runs():
        alone = Segments.build([slot] * (end - begin), 4, device=device)
        assert same(lora_shrink(x[begin:end], A, alone), together[begin:end])
    order = [m for s in (1, 0, -1, 3) for m in range(len(IDS)) if IDS[m] == s]
    moved = Segments.build([IDS[m] for m in order], 4, capacity=20, device=device)
    assert same(lora_shrink(x[order], A, moved), together[order])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_beside_other_rows(device: str) -> None:
    x, A = rows(device, 21), weights(device)
    table = Segments.build([2] * 21, 4, device=device)
    together = lora_shrink(x, A, table)
    others = rows(device, 34).flip(0)
    others[:21:2] = x[::2]
    longer = Segments.build([2] * 34, 4, device=device)
    assert same(lora_shrink(others, A, longer)[:21:2], together[::2])
    if device == "cuda":  # interpreted, a tile is numpy's product, whose rows are not all alike
        order = torch.randperm(21, device=device)
        assert torch.equal(lora_shrink(x[order], A, table), together[order])


@pytest.mark.parametrize("device", DEVICES)
def test_an_updated_table_takes_more_adapters_in_the_same_launch(device: str) -> None:
    x, A = rows(device, len(IDS)), weights(device)
    segments = Segments.build([0] * len(IDS), 4, device=device)
    first = lora_shrink(x, A, segments)
    segments.update(IDS)
    now = lora_shrink(x, A, segments)
    assert torch.equal(now, lora_shrink(x, A, Segments.build(IDS, 4, device=device)))
    assert not torch.equal(now, first)


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_ranks_are_those_of_the_adapters_alone(device: str) -> None:
    """Two targets of capacity 3; nothing behind an adapter's rank is read by the kernel."""
    ranks = [3, 1, 2, 3]
    x, A = rows(device, len(IDS)), weights(device)
    own = torch.tensor([[r % 3 < rank for r in range(6)] for rank in ranks], device=device)
    padded = torch.where(own[..., None], A, 0.0)
    expected = lora_shrink(x, padded, Segments.build(IDS, 4, device=device), targets=2)
    segments = Segments.build(IDS, 4, ranks=ranks, device=device)
    assert torch.equal(lora_shrink(x, padded, segments, targets=2), expected)
    if not runs_reference(x):
        dirty = torch.where(own[..., None], A, float("nan"))
        assert torch.equal(lora_shrink(x, dirty, segments, targets=2), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor_and_slots_of_a_larger_bank(device: str) -> None:
    x, bank = rows(device, len(IDS), 90), weights(device, R=9)
    segments = Segments.build(IDS, 4, device=device)
    x, A = x[:, 10:80], bank[:, 2:8]
    expected = lora_shrink(x.contiguous(), A.contiguous(), segments)
    assert same(lora_shrink(x, A, segments), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    y = lora_shrink(rows(device, 0), weights(device), Segments.build([], 4, device=device))
    assert y.shape == (0, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": lambda x: x[:5]},
            ValueError,
            "lora_shrink: x has 5 rows, expected 29 as in segments",
        ),
        (
            {"A": lambda A: A[:3]},
            ValueError,
            "lora_shrink: lora_A has 3 slots, expected 4 as in segments",
        ),
        (
            {"A": lambda A: A[..., :60]},
            ValueError,
            "lora_shrink: lora_A is [4, 6, 60], expected [slots, R, I] with I=70 from x",
        ),
        (
            {"x": lambda x: x.T.contiguous().T},
            ValueError,
            "lora_shrink: x has stride 29 in I, expected 1; call .contiguous()",
        ),
        (
            {"A": lambda A: A.bfloat16()},
            TypeError,
            "lora_shrink: lora_A is torch.bfloat16, expected float32",
        ),
        (
            {"segments": lambda _: Segments.build(IDS, 4, 48)},
            ValueError,
            "lora_shrink: segments has tiles of 48 rows, expected 16 or 32 or 64 or 128",
        ),
        (
            {"segments": lambda _: Segments.build(IDS, 4, device="meta")},
            ValueError,
            "lora_shrink: segments is on meta, expected cpu like x",
        ),
        (
            {"targets": lambda _: 4},
            ValueError,
            "lora_shrink: targets is 4, expected a divisor of R=6",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    args: dict[str, Any] = {"x": rows("cpu", len(IDS)), "A": weights("cpu")}
    args |= {"segments": Segments.build(IDS, 4), "targets": 1}
    args |= {name: alter(args[name]) for name, alter in change.items()}
    with pytest.raises(error) as caught:
        lora_shrink(*args.values())
    assert str(caught.value) == message
