"""NF4: the published values, the nearest code by brute force, and what comes back."""

from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from fastsafe_kernels.nf4_dequantize import (
    ABSMAX_BLOCK,
    BLOCK,
    CODES,
    dequantize_absmax,
    nf4_dequantize,
    quantize_absmax,
)
from fastsafe_kernels.nf4_quantize import MIDPOINTS, nf4_quantize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF_GAP = max(high - low for low, high in pairwise(CODES)) / 2
EPS = torch.finfo(torch.float32).eps


def halves(codes: Tensor) -> Tensor:
    """One code per weight: the high half of a byte is the first of two."""
    return torch.stack((codes // 16, codes % 16), -1).flatten(1).long()


def weights(O: int, I: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(3)
    return (0.05 * torch.randn(O, I)).to(device, dtype)


def test_the_values_are_the_quantiles_of_the_paper() -> None:
    """Quantiles of N(0, 1) at equal steps of probability, seven below 0 and eight above."""
    tail = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(tail + (0.5 - tail) * i / 8) for i in range(8)]
    below = [-quantile(tail + (0.5 - tail) * i / 7) for i in range(7)]
    values = sorted([*below, 0.0, *above])
    assert [v / max(values) for v in values] == pytest.approx(CODES, abs=1e-6)
    assert (CODES[0], CODES[7], CODES[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_the_nearest_of_sixteen(dtype: torch.dtype, device: str) -> None:
    w = weights(5, 192, device, dtype)
    codes, absmax = nf4_quantize(w)
    blocks = w.double().view(5, 3, BLOCK)
    assert torch.equal(absmax.double(), blocks.abs().amax(-1))
    table = torch.tensor(CODES, dtype=torch.float64, device=device)
    distance = (blocks / absmax[..., None]).view(5, 192, 1) - table
    assert torch.equal(halves(codes), distance.abs().argmin(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_a_midpoint_takes_the_lower_code(device: str) -> None:
    w = torch.zeros(1, BLOCK)
    w[0, :15] = torch.tensor(MIDPOINTS)
    w[0, 15:30] = torch.tensor(MIDPOINTS).nextafter(torch.tensor(2.0))
    w[0, 63] = -1.0  # the absmax, so that nothing is scaled
    codes = halves(nf4_quantize(w.to(device))[0])[0].tolist()
    assert codes[:15] == list(range(15))
    assert codes[15:30] == list(range(1, 16))


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_of_zeros_comes_back_as_zeros(device: str) -> None:
    w = weights(2, 128, device)
    w[0, :BLOCK] = 0.0
    w[1, BLOCK:] = -0.0
    codes, absmax = nf4_quantize(w)
    assert absmax[0, 0] == absmax[1, 1] == 0
    assert set(halves(codes)[0, :BLOCK].tolist()) == {7}
    back = nf4_dequantize(codes, absmax, torch.float32)
    assert back.isfinite().all()
    assert torch.equal(back[0, :BLOCK], torch.zeros(BLOCK, device=device))
    assert torch.equal(back[1, BLOCK:], torch.zeros(BLOCK, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-40, 1e-3, 1e30])
def test_what_comes_back_is_within_half_a_gap(size: float, device: str) -> None:
    """Also where the absmax is subnormal, whose inverse would be infinite."""
    w = weights(7, 256, device) * size
    codes, absmax = nf4_quantize(w)
    back = nf4_dequantize(codes, absmax, torch.float32)
    bound = absmax.repeat_interleave(BLOCK, 1) * (HALF_GAP + 4 * EPS) + 1e-44
    assert ((w - back).abs() <= bound).all()
    largest = w.view(-1, BLOCK).abs().argmax(1)
    rows = torch.arange(len(largest), device=device)
    assert torch.equal(back.view(-1, BLOCK)[rows, largest], w.view(-1, BLOCK)[rows, largest])


@pytest.mark.parametrize("device", DEVICES)
def test_quantizing_what_came_back_changes_nothing(device: str) -> None:
    codes, absmax = nf4_quantize(weights(3, 320, device))
    again, absmax_again = nf4_quantize(nf4_dequantize(codes, absmax, torch.float32))
    assert torch.equal(again, codes)
    assert torch.equal(absmax_again, absmax)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_of_two_weights_is_the_high_half(device: str) -> None:
    w = torch.zeros(1, BLOCK, device=device)
    w[0, 0], w[0, 3] = 2.0, -2.0
    codes, absmax = nf4_quantize(w)
    assert codes[0, :3].tolist() == [0xF7, 0x70, 0x77]
    assert torch.equal(nf4_dequantize(codes, absmax, torch.float32), w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_is_scaled_in_fp32_and_rounded_once(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(8, 32)
    absmax = torch.linspace(0, 3, 8, device=device).view(8, 1)
    table = torch.tensor(CODES, device=device)
    expected = (table[halves(codes)] * absmax).to(dtype)
    assert torch.equal(nf4_dequantize(codes, absmax, dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_weight(device: str) -> None:
    w = weights(5, 320, device)
    codes, absmax = nf4_quantize(w)
    back = nf4_dequantize(codes, absmax)
    for row in range(5):
        alone, absmax_alone = nf4_quantize(w[row : row + 1])
        assert torch.equal(alone[0], codes[row])
        assert torch.equal(nf4_dequantize(alone, absmax_alone)[0], back[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing_gives_nothing(shape: tuple[int, int], device: str) -> None:
    codes, absmax = nf4_quantize(torch.zeros(shape, device=device))
    assert codes.shape == (shape[0], shape[1] // 2)
    assert nf4_dequantize(codes, absmax).shape == shape


def test_nf4_quantize_refuses() -> None:
    refused = [
        (torch.zeros(2, 96), "weight is [2, 96], expected I to be a multiple of 64"),
        (
            torch.zeros(64, 64).T,
            "weight has strides [1, 64], expected contiguous; call .contiguous()",
        ),
        (torch.zeros(2, 64, 1), "weight is [2, 64, 1], expected [O, I]"),
    ]
    for w, message in refused:
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared whole
            nf4_quantize(w)
        assert str(caught.value) == f"nf4_quantize: {message}"
    with pytest.raises(TypeError) as wrong:
        nf4_quantize(torch.zeros(2, 64, dtype=torch.float64))
    expected = "float32 or bfloat16 or float16"
    assert str(wrong.value) == f"nf4_quantize: weight is torch.float64, expected {expected}"


def test_nf4_dequantize_refuses() -> None:
    byte, fp32 = torch.uint8, torch.float32
    codes, absmax = torch.zeros(2, 64, dtype=byte), torch.zeros(2, 2)
    strided = "has strides [1, 2], expected contiguous; call .contiguous()"
    refused = [
        (codes, torch.zeros(2, 3), "codes is [2, 64], expected [2, 96], 32 bytes per absmax"),
        (codes, torch.zeros(3, 2), "absmax is [3, 2], expected [O, blocks] with O=2 from codes"),
        (torch.zeros(64, 2, dtype=byte).T, absmax, f"codes {strided}"),
        (codes, torch.zeros(2, 2).T, f"absmax {strided}"),
    ]
    for c, a, message in refused:
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared whole
            nf4_dequantize(c, a)
        assert str(caught.value) == f"nf4_dequantize: {message}"
    with pytest.raises(TypeError, match=r"^nf4_dequantize: codes is torch.int8, expected uint8$"):
        nf4_dequantize(codes.to(torch.int8), absmax)
    with pytest.raises(TypeError, match=r"^nf4_dequantize: dtype is torch.int32, expected float"):
        nf4_dequantize(codes, absmax.to(fp32), torch.int32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (16, 64)])
def test_absmax_comes_back_within_half_a_step(shape: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    absmax = torch.rand(shape, device=device)
    quantized = quantize_absmax(absmax)
    back = dequantize_absmax(quantized)
    assert back.shape == shape
    assert back.dtype == torch.float32
    assert quantized.codes.dtype == torch.int8
    assert len(quantized.scales) == -(-absmax.numel() // ABSMAX_BLOCK)
    each = quantized.scales.repeat_interleave(ABSMAX_BLOCK)[: absmax.numel()].view(shape)
    assert ((back - absmax).abs() <= each / 254 + 4 * EPS).all()


def test_equal_absmax_comes_back_exactly() -> None:
    for value in (0.0, 0.25):
        absmax = torch.full((2, 200), value)
        quantized = quantize_absmax(absmax)
        assert quantized.scales.tolist() == [0.0, 0.0]
        assert torch.equal(dequantize_absmax(quantized), absmax)


def test_absmax_never_comes_back_negative() -> None:
    """A value near 0 in a block with a large one is where rounding would pass below 0."""
    torch.manual_seed(0)
    absmax = torch.rand(16, ABSMAX_BLOCK)
    absmax[:, 0], absmax[:, 1] = 1e-4, 2 + torch.rand(16)
    assert (dequantize_absmax(quantize_absmax(absmax)) >= 0).all()


def test_double_quantization_takes_the_bits_of_the_paper() -> None:
    """4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight, the mean not counted."""
    w = weights(64, 1024)
    codes, absmax = nf4_quantize(w)
    quantized = quantize_absmax(absmax)
    parts = (codes, quantized.codes, quantized.scales)
    bits = 8 * sum(t.numel() * t.element_size() for t in parts) / w.numel()
    assert bits == pytest.approx(4.127, abs=5e-4)
