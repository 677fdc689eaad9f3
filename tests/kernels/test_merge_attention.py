"""Merging by log-sum-exp is exact where a part is empty, and never makes a NaN of its own."""

import math

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.merge_attention import merge_attention

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
not_promised = pytest.mark.skipif(not INTERPRET, reason="the CPU reference promises no bits")
KERNELS = [pytest.param("cpu", marks=not_promised), GPU]


def part(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(37, 6, 24, device=device).to(dtype),
        10 * torch.randn(37, 6, device=device),
    )


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_part_leaves_the_bits_of_the_other(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    y, lse = part(device, dtype)
    nothing = torch.full_like(y, torch.nan), torch.full_like(lse, -torch.inf)
    for merged in (merge_attention(y, lse, *nothing), merge_attention(*nothing, y, lse)):
        assert torch.equal(merged[0], y)
        assert torch.equal(merged[1], lse)


@pytest.mark.parametrize("device", DEVICES)
def test_two_empty_parts_are_empty(device: str) -> None:
    y = torch.full((3, 2, 8), torch.nan, device=device)
    lse = torch.full((3, 2), -torch.inf, device=device)
    merged = merge_attention(y, lse, y, lse)
    assert torch.equal(merged[0], torch.zeros_like(y))
    assert torch.equal(merged[1], lse)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_do_not_overflow(device: str) -> None:
    y_a, y_b = torch.ones(1, 2, 4, device=device), 3 * torch.ones(1, 2, 4, device=device)
    lse_a, lse_b = (torch.tensor([x], device=device) for x in ([3e4, -3e4], [3e4, 3e4]))
    y, lse = merge_attention(y_a, lse_a, y_b, lse_b)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([2.0, 3.0], device=device))
    torch.testing.assert_close(lse, torch.tensor([[3e4 + math.log(2), 3e4]], device=device))


@pytest.mark.parametrize("device", KERNELS)
def test_bits_do_not_depend_on_the_other_rows(device: str) -> None:
    torch.manual_seed(0)
    a, b = part(device), part(device)
    y, lse = merge_attention(*a, *b)
    for rows in (slice(0, 1), slice(5, 19), slice(36, 37)):
        alone = merge_attention(*(x[rows] for x in (*a, *b)))
        assert torch.equal(alone[0], y[rows])
        assert torch.equal(alone[1], lse[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    y, lse = (x[:0] for x in part(device))
    merged = merge_attention(y, lse, y, lse)
    assert merged[0].shape == (0, 6, 24)
    assert merged[1].shape == (0, 6)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (
            1,
            torch.zeros(2, 3, dtype=torch.bfloat16),
            TypeError,
            "lse_a is torch.bfloat16, expected float32",
        ),
        (2, torch.zeros(2, 3, 4).half(), TypeError, "y_b is torch.float16, expected float32"),
        (3, torch.zeros(3, 2), ValueError, "lse_b is [3, 2], expected [N, H] with N=2 from y_a"),
        (
            2,
            torch.zeros(3, 2, 4).transpose(0, 1),
            ValueError,
            "y_b has strides [4, 8, 1], expected a contiguous tensor; call .contiguous()",
        ),
    ],
)
def test_refuses(position: int, value: Tensor, error: type[Exception], message: str) -> None:
    args = [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)]
    merge_attention(*args)
    args[position] = value
    with pytest.raises(error) as caught:
        merge_attention(*args)
    assert str(caught.value) == f"merge_attention: {message}"
