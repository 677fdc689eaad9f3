"""lora_backward_a: an adapter's gradient is a function of its own rows, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._segments import Segments
from fastsafe_kernels._spec import runs_reference
from fastsafe_kernels.lora_backward_a import lora_backward_a

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [-1] * 3 + [0] * 53 + [3] * 2 + [1] * 16
R, I = 6, 70


def example(device: str, block_m: int = 16) -> tuple[Tensor, Tensor, Segments]:
    """dS, x and the table of a batch in which adapter 0 has four tiles."""
    torch.manual_seed(1)
    dS, x = torch.randn(len(IDS), R, device=device), torch.randn(len(IDS), I, device=device)
    return dS, x, Segments.build(IDS, 4, block_m, device=device)


def same(a: Tensor, b: Tensor, x: Tensor) -> bool:
    """Bit for bit from the kernel; torch's matmul on a CPU promises nothing about bits."""
    return torch.allclose(a, b, 1e-4, 1e-4) if runs_reference(x) else torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_m", [16, 32, 1024])
def test_equals_a_sum_over_rows(device: str, block_m: int) -> None:
    dS, x, segments = example(device, block_m)
    expected = torch.zeros(4, R, I, dtype=torch.float64, device=device)
    for m, slot in enumerate(IDS):
        if slot >= 0:
            expected[slot] += dS[m, :, None].double() * x[m].double()
    found = lora_backward_a(dS, x, segments)
    torch.testing.assert_close(found, expected.float())
    assert torch.equal(found[2], torch.zeros_like(found[2]))  # no rows


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_has_the_same_bits_in_any_company(device: str) -> None:
    dS, x, segments = example(device)
    together = lora_backward_a(dS, x, segments)
    for begin, end, slot in segments.runs():
        alone = Segments.build([slot] * (end - begin), 4, device=device)
        found = lora_backward_a(dS[begin:end], x[begin:end], alone)
        assert same(found[slot], together[slot], x)
    order = [m for s in (1, 0, -1, 3) for m in range(len(IDS)) if IDS[m] == s]
    moved = Segments.build([IDS[m] for m in order], 4, capacity=20, device=device)
    assert same(lora_backward_a(dS[order], x[order], moved), together, x)


@pytest.mark.parametrize("device", DEVICES)
def test_an_updated_table_takes_more_adapters_in_the_same_launch(device: str) -> None:
    dS, x, _ = example(device)
    segments = Segments.build([2] * len(IDS), 4, device=device)
    first = lora_backward_a(dS, x, segments)
    segments.update(IDS)
    now = lora_backward_a(dS, x, segments)
    assert torch.equal(now, lora_backward_a(dS, x, Segments.build(IDS, 4, device=device)))
    assert not torch.equal(now, first)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor_and_no_rows(device: str) -> None:
    dS, x, segments = example(device)
    wide, wide_x = torch.zeros(len(IDS), 20, device=device), torch.zeros(74, 90, device=device)
    wide[:, 3:9], wide_x[:, 10:80] = dS, x
    found = lora_backward_a(wide[:, 3:9], wide_x[:, 10:80], segments)
    assert same(found, lora_backward_a(dS, x, segments), x)
    nothing = lora_backward_a(dS[:0], x[:0], Segments.build([], 4, device=device))
    assert torch.equal(nothing, torch.zeros(4, R, I, device=device))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"dS": lambda s: s[:5], "x": lambda x: x[:5]},
            ValueError,
            "lora_backward_a: dS has 5 rows, expected 74 as in segments",
        ),
        (
            {"x": lambda x: x[:5]},
            ValueError,
            "lora_backward_a: x is [5, 70], expected [M, I] with M=74 from dS",
        ),
        (
            {"x": lambda x: x.half()},
            TypeError,
            "lora_backward_a: x is torch.float16, expected float32",
        ),
        (
            {"x": lambda x: x.T.contiguous().T},
            ValueError,
            "lora_backward_a: x has stride 74 in I, expected 1; call .contiguous()",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    args: dict[str, Any] = dict(zip(("dS", "x", "segments"), example("cpu"), strict=True))
    args |= {name: alter(args[name]) for name, alter in change.items()}
    with pytest.raises(error) as caught:
        lora_backward_a(*args.values())
    assert str(caught.value) == message
