"""What the gate does not see of rope: the weight's gradient, bits, views and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe_kernels._accuracy import accuracy_failures
from fastsafe_kernels._spec import INTERPRET, Dims
from fastsafe_kernels.rope import DW_TOKENS, KERNEL, make_tables, rope
from fastsafe_testing import compile_checks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
NORMED = tuple(dims for dims in KERNEL.tests if dims["norm"])
TRAINED = replace(
    KERNEL, grads=(0, 3), tests=NORMED, bench=tuple(d for d in KERNEL.bench if d["norm"])
)


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def tables(N: int, R: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(7)
    return tuple(t.to(device, dtype) for t in make_tables(N, R, torch.device("cpu")))


def run(x: Tensor, cos: Tensor, sin: Tensor, w: Tensor | None, g: Tensor) -> list[Tensor]:
    """Result, gradient of x and, where it trains, of w."""
    x = x.detach().requires_grad_()
    y = rope(x, cos, sin, w)
    wanted = [x] if w is None or not w.requires_grad else [x, w]
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", NORMED, ids=str)
def test_the_gradient_of_the_weight_equals_the_reference(
    dims: Dims, dtype: torch.dtype, device: str
) -> None:
    assert accuracy_failures(TRAINED, dims, dtype, torch.device(device)) == []


@pytest.mark.parametrize("device", DEVICES)
def test_tables_in_fp32_beside_bf16_are_not_rounded(device: str) -> None:
    x, (cos, sin) = random(3, 2, 8, dtype=torch.bfloat16, device=device), tables(3, 8, device)
    y = rope(x, cos, sin)
    assert torch.equal(y, rope(x.float(), cos, sin).bfloat16())
    assert not torch.equal(y, rope(x, cos.bfloat16(), sin.bfloat16()))


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_turn_as_complex_numbers(device: str) -> None:
    """An independent definition: feature i and i + R/2 are one complex number."""
    x, angles = random(5, 3, 12, device=device), 10 * random(5, 4, seed=1, device=device)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    turned = torch.complex(x[..., :4], x[..., 4:8])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    want = torch.cat((turned.real, turned.imag, x[..., 8:]), -1)
    torch.testing.assert_close(rope(x, cos, sin), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_beyond_the_rotation_keep_their_bits(dtype: torch.dtype, device: str) -> None:
    x = random(3, 2, 12, dtype=dtype, device=device)
    y = rope(x, *tables(3, 8, device))
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert not torch.equal(y[..., :8], x[..., :8])


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_half_of_the_tables_is_not_read(device: str) -> None:
    """So that tables with -sin in the first half serve as well."""
    x, (cos, sin) = random(3, 2, 8, device=device), tables(3, 8, device)
    signed = torch.cat((-sin[:, :4], sin[:, 4:]), -1)
    assert torch.equal(rope(x, cos, signed), rope(x, cos, sin))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trains", [False, True])
def test_a_head_has_the_same_bits_in_any_batch(
    trains: bool, dtype: torch.dtype, device: str
) -> None:
    N, H, D = 3, 18, 128
    x, g = random(2, N, H, D, dtype=dtype, device=device)
    w = random(D, seed=1, dtype=dtype, device=device).requires_grad_(trains)
    cos, sin = tables(N, D, device, dtype)
    together = run(x, cos, sin, w, g)[:2]
    flipped = run(x.flip(0, 1), cos.flip(0), sin.flip(0), w, g.flip(0, 1))[:2]
    alone = run(x[1:2, 17:], cos[1:2], sin[1:2], w, g[1:2, 17:])[:2]
    for result, other, one in zip(together, flipped, alone, strict=True):
        assert torch.equal(other.flip(0, 1), result)
        assert torch.equal(one, result[1:2, 17:])


@pytest.mark.parametrize("device", DEVICES)
def test_the_weight_gradient_is_summed_by_blocks_of_tokens(device: str) -> None:
    """Each block's sum has the bits that it has alone, whatever else is in the batch."""
    N = 2 * DW_TOKENS
    x, g = random(2, N, 2, 8, device=device)
    w, (cos, sin) = random(8, seed=1, device=device).requires_grad_(), tables(N, 8, device)

    def weight_gradient(block: slice) -> Tensor:
        return run(x[block], cos[block], sin[block], w, g[block])[2]

    one, other = weight_gradient(slice(DW_TOKENS)), weight_gradient(slice(DW_TOKENS, None))
    both = weight_gradient(slice(None))
    if device == "cpu" and not INTERPRET:  # torch sums all tokens at once
        torch.testing.assert_close(both, one + other)
    else:
        assert torch.equal(both, one + other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True])
def test_heads_of_a_fused_projection_need_no_copy(norm: bool, device: str) -> None:
    """x, the tables and the upstream gradient are views."""
    qkv = random(3, 64, device=device)
    k = qkv[:, 16:48].view(3, 2, 16)
    cos, sin = torch.cat(tables(3, 16, device), -1).chunk(2, -1)
    w = random(16, seed=1, device=device).requires_grad_() if norm else None
    g = random(3, 16, 2, seed=2, device=device).transpose(1, 2)
    got = run(k, cos, sin, w, g)
    want = run(k.contiguous(), cos.contiguous(), sin.contiguous(), w, g.contiguous())
    torch.testing.assert_close(got, want)
    by_head = k.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(run(by_head, cos, sin, w, g), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 8)])
def test_no_tokens_or_no_heads(shape: tuple[int, ...], device: str) -> None:
    x, w = torch.zeros(shape, device=device), torch.ones(8, device=device).requires_grad_()
    cos, sin = tables(shape[0], 8, device)
    y, dx, dw = run(x, cos, sin, w, torch.zeros_like(x))
    assert y.shape == dx.shape == shape
    assert dw.tolist() == [0.0] * 8


X, TABLE = torch.zeros(3, 2, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (X, TABLE, TABLE[:2]),
            ValueError,
            "rope: sin is [2, 8], expected [N, R] with N=3 from x",
        ),
        (
            (X, torch.zeros(3, 10), torch.zeros(3, 10)),
            ValueError,
            "rope: cos is [3, 10], expected an even R up to D=8",
        ),
        (
            (X, TABLE[:, :3], TABLE[:, :3]),
            ValueError,
            "rope: cos is [3, 3], expected an even R up to D=8",
        ),
        (
            (X, TABLE[:, :0], TABLE[:, :0]),
            ValueError,
            "rope: cos is [3, 0], expected an even R up to D=8",
        ),
        (
            (X, TABLE, TABLE.bfloat16()),
            TypeError,
            "rope: sin is torch.bfloat16, expected float32",
        ),
        (
            (X.bfloat16(), TABLE.half(), TABLE),
            TypeError,
            "rope: cos is torch.float16, expected bfloat16 or float32",
        ),
        (
            (X, TABLE, TABLE, torch.zeros(2)),
            ValueError,
            "rope: norm_weight is [2], expected [D] with D=8 from x",
        ),
        (
            (X.bfloat16(), TABLE, TABLE, torch.zeros(8)),
            TypeError,
            "rope: norm_weight is torch.float32, expected bfloat16",
        ),
        (
            (torch.zeros(3, 8, 2).mT, TABLE, TABLE),
            ValueError,
            "rope: x has stride 2 in D, expected 1; call .contiguous()",
        ),
        (
            (X, torch.zeros(8, 3).T, TABLE),
            ValueError,
            "rope: cos has stride 3 in R, expected 1; call .contiguous()",
        ),
    ],
)
def test_refuses(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        rope(*args)
    assert str(caught.value) == message


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")
def test_a_trained_norm_weight_compiles(tmp_path: Path) -> None:
    """The compile tests leave it frozen, as a point without a norm has none to train."""
    known = set(compile_checks.launches(KERNEL))
    launches = [launch for launch in compile_checks.launches(TRAINED) if launch not in known]
    names = {launch.function.__name__ for launch in launches}
    assert names == {"_backward_kernel", "_sum_rows_kernel"}
    for launch in launches:
        for capability in compile_checks.SHARED_BYTES:
            compile_checks.assert_compiles(TRAINED, launch, capability, tmp_path)
