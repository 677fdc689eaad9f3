"""A row of the product has the same bits in any batch, across every change of tile."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsafe_kernels._spec import INTERPRET
from fastsafe_kernels.matmul_invariant import BLOCK_K, FULL, TileShape, matmul_invariant, tile

MODULE: Any = sys.modules["fastsafe_kernels.matmul_invariant"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# on a CPU the kernel is there only when interpreted; torch's own product makes no promise
KERNELS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def operands(M: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    x, w = torch.randn(M, K), torch.randn(N, K)
    return x.to(device, dtype), w.to(device, dtype)


@pytest.fixture
def dots_in_order(bf16_repair: pytest.MonkeyPatch) -> None:
    """Products of tiles that add in the order of k, as a matrix unit does.

    The interpreter multiplies with BLAS, where an element's order of adding depends on its place.
    Summing each block of k from 0 makes another BLOCK_K another result, so that it is seen too.
    """
    if not INTERPRET:
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = (self.cast_impl(t, tl.float32).data for t in (a, b))
        total = np.zeros_like(d.data)
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    bf16_repair.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("dots_in_order")
@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [1, FULL])
def test_a_row_has_the_same_bits_for_every_number_of_rows(
    full: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``full`` 1 the largest tile is reached at a size that the interpreter can bear."""
    monkeypatch.setattr(MODULE, "FULL", full)
    x, w = operands(133, 70, 200, dtype, device)
    whole = matmul_invariant(x, w)
    for rows in (1, 2, 16, 17, 33, 64, 65, 129):
        assert torch.equal(matmul_invariant(x[:rows], w), whole[:rows]), rows


@pytest.mark.usefixtures("dots_in_order")
@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_place(dtype: torch.dtype, device: str) -> None:
    x, w = operands(66, 70, 200, dtype, device)
    whole = matmul_invariant(x, w)
    assert torch.equal(matmul_invariant(x.flip(0), w).flip(0), whole)
    for row in (0, 1, 31, 65):
        other = torch.full_like(x, 3.0)
        other[7] = x[row]
        assert torch.equal(matmul_invariant(other, w)[7], whole[row])
        assert torch.equal(matmul_invariant(x[row : row + 1], w)[0], whole[row])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (4096, 14_336), (1000, 520)])
def test_on_a_gpu_real_sizes_keep_their_bits(N: int, K: int, dtype: torch.dtype) -> None:
    x, w = operands(2049, N, K, dtype, "cuda")
    whole = matmul_invariant(x, w)
    for rows in (1, 2, 7, 16, 17, 32, 33, 64, 65, 128, 129, 256, 511, 1024, 2048):
        assert torch.equal(matmul_invariant(x[:rows], w), whole[:rows]), rows
        assert torch.equal(matmul_invariant(x[-rows:], w), whole[-rows:]), rows
    assert torch.equal(matmul_invariant(x, w), whole)


def test_the_tile_follows_the_rows_and_block_k_does_not() -> None:
    sizes = (1, 16, 17, 64, 65, 128, 129, 512, 1024, 16_384)
    rows = [tile(M, 4096, 2).rows for M in sizes]
    assert rows == [16, 16, 64, 64, 128, 128, 128, 128, 128, 128]
    assert [tile(M, 4096, 2).swap for M in sizes] == 8 * [True] + 2 * [False]
    for M in sizes:
        for N in (64, 4096, 28_672, 128_256):
            way = tile(M, N, 2)
            # Hopper's wgmma takes 64 rows of its left operand
            assert (way.outputs if way.swap else way.rows) % 64 == 0
            assert way.rows >= min(M, 16)
            programs = triton.cdiv(M, way.rows) * triton.cdiv(N, way.outputs)
            assert way.swap or programs >= FULL
    assert "BLOCK_K" not in TileShape._fields
    assert set(BLOCK_K) == {2, 4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [19, 300])
def test_whole_numbers_are_exact(
    M: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of whole numbers below 256 have no rounding in any of the dtypes."""
    monkeypatch.setattr(MODULE, "GROUP", 2)  # several groups of row tiles, the last not full
    torch.manual_seed(0)
    x = torch.randint(-1, 2, (M, 130)).to(device, dtype)
    w = torch.randint(-1, 2, (70, 130)).to(device, dtype)
    y = matmul_invariant(x, w)
    assert y.dtype == dtype
    assert torch.equal(y, x @ w.T)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_be_any_distance_apart(device: str) -> None:
    x, w = operands(9, 20, 70, torch.float32, device)
    wide_x = torch.full((9, 100), torch.nan, device=device)
    wide_w = torch.full((40, 70), torch.nan, device=device)
    wide_x[:, :70], wide_w[::2] = x, w
    assert torch.equal(matmul_invariant(wide_x[:, :70], wide_w[::2]), matmul_invariant(x, w))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_gives_nothing_or_zeros(device: str) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    assert matmul_invariant(empty(0, 8), empty(5, 8)).shape == (0, 5)
    assert matmul_invariant(empty(4, 8), empty(0, 8)).shape == (4, 0)
    assert torch.equal(matmul_invariant(empty(4, 0), empty(5, 0)), empty(4, 5))


def test_matmul_invariant_refuses() -> None:
    x, w = torch.zeros(4, 8), torch.zeros(5, 8)
    strided = "has stride 5 in K, expected 1; call .contiguous()"
    refused = [
        (x, torch.zeros(5, 9), "weight is [5, 9], expected [N, K] with K=8 from x"),
        (torch.zeros(8), w, "x is [8], expected [M, K]"),
        (torch.zeros(8, 5).T, w, f"x {strided}"),
        (x, torch.zeros(8, 5).T, f"weight {strided}"),
        (x, w.to("meta"), "weight is on meta, expected cpu like x"),
    ]
    for left, right, message in refused:
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared whole
            matmul_invariant(left, right)
        assert str(caught.value) == f"matmul_invariant: {message}"
    with pytest.raises(TypeError) as wrong:
        matmul_invariant(x, w.bfloat16())
    assert str(wrong.value) == "matmul_invariant: weight is torch.bfloat16, expected float32"
