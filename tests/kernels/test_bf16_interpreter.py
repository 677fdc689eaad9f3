"""The repair of the interpreter's bf16 is exact, and still needed."""

import pytest
import torch
import triton
import triton.language as tl

from fastsafe_kernels._spec import INTERPRET

pytestmark = pytest.mark.skipif(
    not INTERPRET, reason="tests Triton's interpreter: TRITON_INTERPRET=1"
)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, c)


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def dot_error() -> float:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, BLOCK=16)
    return float((c - a.float() @ b.float()).abs().max())


def rounding_is_exact() -> bool:
    torch.manual_seed(0)
    x, y = torch.randn(256), torch.empty(256, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, BLOCK=256)
    return torch.equal(y, x.bfloat16())


def test_with_the_repair_bf16_is_right() -> None:
    assert dot_error() < 1e-5
    assert rounding_is_exact()


def test_without_the_repair_bf16_is_wrong(bf16_repair: pytest.MonkeyPatch) -> None:
    """When this fails, Triton's interpreter has learnt bf16: delete the repair."""
    bf16_repair.undo()
    assert not dot_error() < 1.0
    assert not rounding_is_exact()
