"""lora_backward_b: dS is a function of a row and dB of an adapter's own rows, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._segments import Segments
from fastsafe_kernels._spec import runs_reference
from fastsafe_kernels.lora_backward_b import lora_backward_b

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [-1] * 3 + [0] * 53 + [3] * 2 + [1] * 16
PARTS = ((0, 40), (44, 100))  # columns 40..43 and 100..109 belong to no target
O, RANK = 110, 5


def example(device: str, block_m: int = 16) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """dY, shrunk, lora_B and the table of a batch in which adapter 0 has four tiles."""
    torch.manual_seed(1)
    dY = torch.randn(len(IDS), O, device=device)
    shrunk = torch.randn(len(IDS), len(PARTS) * RANK, device=device)
    lora_B = torch.randn(4, O, RANK, device=device)
    return dY, shrunk, lora_B, Segments.build(IDS, 4, block_m, device=device)


def same(a: Tensor, b: Tensor, dY: Tensor) -> bool:
    """Bit for bit from the kernel; torch's matmul on a CPU promises nothing about bits."""
    return torch.allclose(a, b, 1e-4, 1e-4) if runs_reference(dY) else torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_m", [16, 32, 1024])
def test_equals_a_sum_over_rows(device: str, block_m: int) -> None:
    dY, shrunk, lora_B, segments = example(device, block_m)
    dS, dB = torch.zeros_like(shrunk), torch.zeros_like(lora_B)
    for m, slot in enumerate(IDS):
        for t, (begin, end) in enumerate(PARTS):
            if slot >= 0:
                ranks = slice(t * RANK, (t + 1) * RANK)
                dS[m, ranks] = dY[m, begin:end] @ lora_B[slot, begin:end]
                dB[slot, begin:end] += dY[m, begin:end, None] * shrunk[m, ranks]
    found_dS, found_dB = lora_backward_b(dY, shrunk, lora_B, segments, PARTS)
    torch.testing.assert_close(found_dS, dS, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_dB, dB, rtol=1e-4, atol=1e-4)
    for zero in (found_dS[:3], found_dB[2], found_dB[:, 40:44], found_dB[:, 100:]):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_has_the_same_bits_in_any_company(device: str) -> None:
    dY, shrunk, lora_B, segments = example(device)
    dS, dB = lora_backward_b(dY, shrunk, lora_B, segments, PARTS)
    for begin, end, slot in segments.runs():
        alone = Segments.build([slot] * (end - begin), 4, device=device)
        own = slice(begin, end)
        own_dS, own_dB = lora_backward_b(dY[own], shrunk[own], lora_B, alone, PARTS)
        assert same(own_dS, dS[own], dY)
        assert same(own_dB[slot], dB[slot], dY)
    order = [m for s in (1, 0, -1, 3) for m in range(len(IDS)) if IDS[m] == s]
    moved = Segments.build([IDS[m] for m in order], 4, capacity=20, device=device)
    moved_dS, moved_dB = lora_backward_b(dY[order], shrunk[order], lora_B, moved, PARTS)
    assert same(moved_dS, dS[order], dY)
    assert same(moved_dB, dB, dY)


@pytest.mark.parametrize("device", DEVICES)
def test_an_updated_table_takes_more_adapters_in_the_same_launch(device: str) -> None:
    dY, shrunk, lora_B, fresh = example(device)
    segments = Segments.build([2] * len(IDS), 4, device=device)
    first = lora_backward_b(dY, shrunk, lora_B, segments, PARTS)
    segments.update(IDS)
    now = lora_backward_b(dY, shrunk, lora_B, segments, PARTS)
    for a, b, before in zip(
        now, lora_backward_b(dY, shrunk, lora_B, fresh, PARTS), first, strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor_and_no_rows(device: str) -> None:
    dY, shrunk, lora_B, segments = example(device)
    wide, bank = torch.zeros(len(IDS), 130, device=device), torch.zeros(4, 115, 7, device=device)
    wide[:, 10:120], bank[:, 5:, 1:6] = dY, lora_B
    found = lora_backward_b(wide[:, 10:120], shrunk, bank[:, 5:, 1:6], segments, PARTS)
    expected = lora_backward_b(dY, shrunk, lora_B, segments, PARTS)
    assert all(same(a, b, dY) for a, b in zip(found, expected, strict=True))
    none = Segments.build([], 4, device=device)
    dS, dB = lora_backward_b(dY[:0], shrunk[:0], lora_B, none, PARTS)
    assert dS.shape == (0, 10)
    assert torch.equal(dB, torch.zeros_like(lora_B))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"dY": lambda y: y[:5], "shrunk": lambda s: s[:5]},
            ValueError,
            "lora_backward_b: dY has 5 rows, expected 74 as in segments",
        ),
        (
            {"lora_B": lambda B: B[:3]},
            ValueError,
            "lora_backward_b: lora_B has 3 slots, expected 4 as in segments",
        ),
        (
            {"lora_B": lambda B: B.half()},
            TypeError,
            "lora_backward_b: lora_B is torch.float16, expected float32",
        ),
        (
            {"lora_B": lambda B: B.transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError,
            "lora_backward_b: lora_B has stride 110 in r, expected 1; call .contiguous()",
        ),
        (
            {"shrunk": lambda s: s[:, :9]},
            ValueError,
            "lora_backward_b: shrunk has 9 columns, expected 10 for 2 parts of rank 5",
        ),
        (
            {"parts": lambda _: ((44, 100), (0, 40))},
            ValueError,
            "lora_backward_b: parts is ((44, 100), (0, 40)), expected (begin, end) pairs that rise "
            "within [0, 110]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("dY", "shrunk", "lora_B", "segments")
    args: dict[str, Any] = dict(zip(names, example("cpu"), strict=True)) | {"parts": PARTS}
    args |= {name: alter(args[name]) for name, alter in change.items()}
    with pytest.raises(error) as caught:
        lora_backward_b(*args.values())
    assert str(caught.value) == message
