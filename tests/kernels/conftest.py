"""Triton's interpreter multiplies the bit patterns of bf16 numbers and truncates when it rounds to
bf16, without an error. While the kernels are interpreted, every test here gets it repaired.

Reductions are not covered: a kernel casts to fp32 before it sums, on a GPU too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl

from fastsafe_kernels._spec import INTERPRET


def widen(bits: Any) -> Any:
    """Read uint16 bit patterns of bf16 as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: Any) -> Any:
    """Round fp32 to the nearest bf16, ties to even, and return its bit patterns."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def repair(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter compute bf16 as a GPU does: in fp32, rounded to nearest even."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def is_bf16(x: Any) -> bool:
        return bool(x.dtype.scalar == tl.bfloat16)

    def as_fp32(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if is_bf16(x) and dtype.scalar != tl.bfloat16:
            x = as_fp32(x)
            return x if dtype.scalar == tl.float32 else cast(self, x, dtype)
        if dtype.scalar == tl.bfloat16 and not is_bf16(x):
            return handle(narrow(x.data.astype(np.float32)), tl.bfloat16)
        return cast(self, x, dtype)

    def create_fp_to_fp(self: Any, x: Any, dtype: Any, rounding: Any) -> Any:
        if {x.dtype.scalar, dtype.scalar} == {tl.bfloat16, tl.float32}:
            return cast_impl(self, x, dtype)
        return convert(self, x, dtype, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, as_fp32(a), as_fp32(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        if result.dtype == bool:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return handle(narrow(op(widen(x.data))), tl.bfloat16) if is_bf16(x) else unary(self, x, op)

    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_fp_to_fp", create_fp_to_fp)
    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "binary_op", binary_op)
    patch.setattr(builder, "unary_op", unary_op)


@pytest.fixture(autouse=True)
def bf16_repair() -> Iterator[pytest.MonkeyPatch]:
    """Repair bf16 for one test; ``undo()`` on the value brings the interpreter's own back."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRET:
            repair(patch)
        yield patch
