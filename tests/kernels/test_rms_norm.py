"""What the gate does not see of rms_norm: bits, missing gradients, views and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe_kernels._accuracy import accuracy_failures
from fastsafe_kernels._spec import INTERPRET, Dims
from fastsafe_kernels.rms_norm import (
    DW_ROWS,
    KERNEL,
    LIMIT,
    WIDE_DW_ROWS,
    reference,
    rms_norm,
    sum_rows,
)
from fastsafe_testing import compile_checks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
# rows that share a program, one row per program, two sweeps; whether the weight trains
TILES = [(64, False), (64, True), (2000, False), (2000, True), (LIMIT + 8, False)]


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def run(x: Tensor, w: Tensor, residual: Tensor | None, g: Tensor, e: Tensor) -> list[Tensor]:
    """Results, and the gradients of x and, where it trains, of w."""
    x = x.detach().requires_grad_()
    y, h = rms_norm(x, w, residual, residual_scale=0.5)
    wanted = [x, w] if w.requires_grad else [x]
    return [y.detach(), h.detach(), *torch.autograd.grad([y, h], wanted, [g, e])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "trains"), TILES)
def test_a_row_has_the_same_bits_in_any_batch(
    C: int, trains: bool, dtype: torch.dtype, device: str
) -> None:
    x, residual, g, e = random(4, 3, C, dtype=dtype, device=device)
    w = random(C, seed=1, dtype=dtype, device=device).requires_grad_(trains)
    together = run(x, w, residual, g, e)[:3]
    flipped = run(x.flip(0), w, residual.flip(0), g.flip(0), e.flip(0))[:3]
    alone = [run(x[i:][:1], w, residual[i:][:1], g[i:][:1], e[i:][:1]) for i in range(3)]
    for i, result in enumerate(together):
        assert torch.equal(flipped[i].flip(0), result)
        assert torch.equal(torch.cat([row[i] for row in alone]), result)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "C"), [(DW_ROWS, 40), (WIDE_DW_ROWS, LIMIT + 8)])
def test_the_weight_gradient_is_summed_by_blocks_of_rows(rows: int, C: int, device: str) -> None:
    """Each block's sum has the bits that it has alone, whatever else is in the batch."""
    x, g = random(2, 2 * rows, C, device=device)
    w = random(C, seed=1, device=device).requires_grad_()

    def weight_gradient(block: slice) -> Tensor:
        return torch.autograd.grad(rms_norm(x[block], w)[0], w, g[block])[0]

    one, other = weight_gradient(slice(rows)), weight_gradient(slice(rows, None))
    both = weight_gradient(slice(None))
    if device == "cpu" and not INTERPRET:  # torch sums all rows at once
        torch.testing.assert_close(both, one + other)
    else:
        assert torch.equal(both, one + other)


@pytest.mark.parametrize("device", DEVICES)
def test_many_partial_sums_are_all_added(device: str) -> None:
    if device == "cpu" and not INTERPRET:
        pytest.skip("a kernel, not an op: it has no reference")
    partial = torch.arange(300 * 40, dtype=torch.float32, device=device).view(300, 40)
    assert torch.equal(sum_rows(partial, torch.float32), partial.sum(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grads", [(0,), (0, 1, 2)], ids=["frozen weight", "residual"])
@pytest.mark.parametrize("dims", [d for d in KERNEL.tests if d["residual"]], ids=str)
def test_other_gradients_equal_the_reference(
    dims: Dims, grads: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    assert accuracy_failures(replace(KERNEL, grads=grads), dims, dtype, torch.device(device)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "h", "both"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_result_that_nobody_uses(
    has_residual: bool, used: tuple[int, ...], scale: float, device: str
) -> None:
    """Its missing gradient counts as 0, and arguments behind no used result receive none."""
    x, residual = random(2, 3, 8, device=device)
    w, g = random(8, seed=1, device=device), random(2, 3, 8, seed=2, device=device)
    x, residual, w = leaves = [t.detach().requires_grad_() for t in (x, residual, w)]
    found = []
    for fn in (rms_norm, reference):
        results = fn(x, w, residual if has_residual else None, residual_scale=scale)
        chosen = [results[i] for i in used]
        gradients = torch.autograd.grad(chosen, leaves, [g[i] for i in used], allow_unused=True)
        found.append(gradients)
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_residual_h_is_x(device: str) -> None:
    x = random(2, 8, device=device)
    assert rms_norm(x, x[0])[1] is x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_h_is_the_rounded_sum_and_y_its_norm(dtype: torch.dtype, device: str) -> None:
    """y of the fused sum has the bits of y of the sum: what was rounded is what is normalised."""
    x, residual = random(2, 3, 257, dtype=dtype, device=device)
    w = random(257, seed=1, dtype=dtype, device=device)
    y, h = rms_norm(x, w, residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(rms_norm(h, w)[0], y)


def test_the_reference_rounds_as_torch_does() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, w = random(50, 257, dtype=dtype), random(257, seed=1, dtype=dtype)
        assert torch.equal(reference(x, w)[0], F.rms_norm(x, w.shape, w, 1e-6))


@pytest.mark.parametrize("device", DEVICES)
def test_one_plus_adds_in_fp32(device: str) -> None:
    """In bf16 a weight of 0.002 would vanish beside 1."""
    x = random(2, 64, dtype=torch.bfloat16, device=device)
    w = torch.full((64,), 0.002, dtype=torch.bfloat16, device=device)
    got = rms_norm(x, w, one_plus=True)[0]
    assert torch.equal(got, rms_norm(x.float(), 1 + w.float())[0].bfloat16())
    assert not torch.equal(got, rms_norm(x, 1 + w)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("C", [16, LIMIT + 8])
def test_rows_may_be_strided(C: int, has_residual: bool, device: str) -> None:
    """Columns of wider matrices, of two widths, and upstream gradients of any layout."""
    x, w = random(3, 2 * C, device=device)[:, :C], random(C, seed=1, device=device)
    residual = random(3, 3 * C, seed=2, device=device)[:, C : 2 * C] if has_residual else None
    g, e = random(C, 3, seed=3, device=device).T, random(C, seed=4, device=device).expand(3, C)
    got = run(x, w, residual, g, e)
    copy = None if residual is None else residual.contiguous()
    torch.testing.assert_close(got, run(x.contiguous(), w, copy, g.contiguous(), e.contiguous()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_residual", [False, True])
def test_no_rows(has_residual: bool, device: str) -> None:
    x, w = torch.zeros(0, 8, device=device).requires_grad_(), torch.ones(8, device=device)
    y, h = rms_norm(x, w.requires_grad_(), torch.zeros_like(x) if has_residual else None)
    assert y.shape == h.shape == (0, 8)
    dx, dw = torch.autograd.grad(y.sum() + h.sum(), [x, w])
    assert dx.shape == (0, 8)
    assert dw.tolist() == [0.0] * 8


ROWS, WEIGHT = torch.zeros(3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (ROWS, torch.zeros(9)),
            ValueError,
            "rms_norm: weight is [9], expected [C] with C=8 from x",
        ),
        (
            (ROWS, WEIGHT, torch.zeros(2, 8)),
            ValueError,
            "rms_norm: residual is [2, 8], expected [N, C] with N=3 from x",
        ),
        (
            (ROWS.bfloat16(), WEIGHT),
            TypeError,
            "rms_norm: weight is torch.float32, expected bfloat16",
        ),
        (
            (ROWS.double(), WEIGHT.double()),
            TypeError,
            "rms_norm: x is torch.float64, expected float32 or bfloat16 or float16",
        ),
        (
            (torch.zeros(8, 3).T, WEIGHT),
            ValueError,
            "rms_norm: x has stride 3 in C, expected 1; call .contiguous()",
        ),
        (
            (ROWS, WEIGHT, torch.zeros(8, 3).T),
            ValueError,
            "rms_norm: residual has stride 3 in C, expected 1; call .contiguous()",
        ),
        (
            (ROWS, torch.zeros(16)[::2]),
            ValueError,
            "rms_norm: weight has stride 2 in C, expected 1; call .contiguous()",
        ),
    ],
)
def test_refuses(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        rms_norm(*args)
    assert str(caught.value) == message


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_frozen_weight_compiles(capability: int, tmp_path: Path) -> None:
    """The compile tests train the weight; adapters leave it frozen, which is another kernel."""
    frozen = replace(KERNEL, grads=(0,))
    known = set(compile_checks.launches(KERNEL))
    launches = [launch for launch in compile_checks.launches(frozen) if launch not in known]
    assert {launch.function.__name__ for launch in launches} == {"_backward_kernel"}
    for launch in launches:
        compile_checks.assert_compiles(frozen, launch, capability, tmp_path)
