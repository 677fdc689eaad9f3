from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe.model.layers import gated, rms_norm, rope, softcap


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def rms_norm_defined(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rope_defined(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2), one by one, as complex numbers."""
    half = angles.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


ANGLES = random(5, 4, seed=9)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, 1e-3),
        lambda x, w: rms_norm_defined(x, w, 1e-3),
        (random(5, 8), random(8, seed=1)),
    ),
    "rms_norm of heads": (
        lambda x, w: rms_norm(x, w, 1e-3),
        lambda x, w: rms_norm_defined(x, w, 1e-3),
        (random(5, 3, 8), random(8, seed=1)),
    ),
    "gated by silu": (
        lambda x: gated(x, "silu"),
        lambda x: F.silu(x[:, :6]) * x[:, 6:],
        (random(5, 12),),
    ),
    "gated by gelu": (
        lambda x: gated(x, "gelu_tanh"),
        lambda x: F.gelu(x[:, :6], approximate="tanh") * x[:, 6:],
        (random(5, 12),),
    ),
    "rope": (
        lambda x: rope(x, *tables(ANGLES)),
        lambda x: rope_defined(x, ANGLES),
        (random(5, 3, 8),),
    ),
    "rope of a part of a head": (
        lambda x: rope(x, *tables(ANGLES)),
        lambda x: rope_defined(x, ANGLES),
        (random(5, 3, 12),),
    ),
    "softcap": (
        lambda x: softcap(x, 1.5),
        lambda x: 1.5 * torch.tanh(x / 1.5),
        (random(5, 8),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition_and_gradients(name: str) -> None:
    op, definition, inputs = CASES[name]
    with torch.no_grad():
        torch.testing.assert_close(op(*inputs), definition(*inputs), rtol=1e-5, atol=3e-6)
    leaves = [x.clone().requires_grad_() for x in inputs]
    others = [x.clone().requires_grad_() for x in inputs]
    got, want = op(*leaves), definition(*others)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-6)
    upstream = random(*got.shape, seed=4)
    got.backward(upstream)
    want.backward(upstream)
    for x, y in zip(leaves, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_are_not_changed(grad: bool) -> None:
    for op, _, inputs in CASES.values():
        leaves = [x.clone().requires_grad_(grad) for x in inputs]
        op(*leaves)
        assert all(torch.equal(a, b) for a, b in zip(leaves, inputs, strict=True))


def test_one_plus_norm_adds_one_in_fp32() -> None:
    x, w = random(5, 64).bfloat16(), (random(64, seed=1) * 0.01).bfloat16()
    want = rms_norm_defined(x.double(), 1 + w.double(), 1e-6).bfloat16()
    got = rms_norm(x, w, 1e-6, one_plus=True)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0.0)
    coarse = rms_norm(x, 1 + w, 1e-6)  # 1 + w rounded to bf16
    assert (got != coarse).any()
