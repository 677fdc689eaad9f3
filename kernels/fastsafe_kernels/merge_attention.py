"""Attention over two sets of keys from the attention over each.

    lse = log(exp lse_a + exp lse_b)
    y   = exp(lse_a - lse) y_a + exp(lse_b - lse) y_b

An empty set has lse = -inf, and what its y holds is not looked at; of two empty sets y = 0 and
lse = -inf.

Shapes   y_a, y_b [N, H, D], lse_a, lse_b [N, H]  ->  y [N, H, D], lse [N, H]
Dtypes   y_a, y_b, y alike: fp32, bf16 or fp16; lse_a, lse_b, lse and all arithmetic fp32
Cost     reads both parts and writes the result once
Source   Juravsky et al. 2024, arXiv:2402.05099, section 3.1
Used by  fastsafe.engine (a shared prefix and each row's own tokens)
"""

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

BLOCK = 2048  # numbers of one program


def reference(y_a: Tensor, lse_a: Tensor, y_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch; weights in the dtype of ``lse_a``."""
    m = torch.maximum(lse_a, lse_b)
    m = m.masked_fill(m == -torch.inf, 0)
    a, b = torch.exp(lse_a - m)[..., None], torch.exp(lse_b - m)[..., None]
    y = a * y_a.masked_fill(a == 0, 0) + b * y_b.masked_fill(b == 0, 0)
    s = a + b
    return (y / s.masked_fill(s == 0, 1)).to(y_a.dtype), m + torch.log(s[..., 0])


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    y_a_ptr,
    lse_a_ptr,
    y_b_ptr,
    lse_b_ptr,
    y_ptr,
    lse_ptr,
    rows,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    keep = r < rows
    a = tl.load(lse_a_ptr + r, mask=keep, other=-float("inf"))
    b = tl.load(lse_b_ptr + r, mask=keep, other=-float("inf"))
    m = tl.maximum(a, b)
    m = tl.where(m == -float("inf"), 0.0, m)
    weight_a = tl.exp(a - m)
    weight_b = tl.exp(b - m)
    s = weight_a + weight_b
    at = r[:, None] * D + d[None, :]
    keep_y = keep[:, None] & (d < D)[None, :]
    y_a = tl.load(y_a_ptr + at, mask=keep_y, other=0.0).to(tl.float32)
    y_b = tl.load(y_b_ptr + at, mask=keep_y, other=0.0).to(tl.float32)
    # chosen, not masked in the load, which would wait for lse; and 0 * nan is nan
    y_a = tl.where((weight_a > 0)[:, None], y_a, 0.0)
    y_b = tl.where((weight_b > 0)[:, None], y_b, 0.0)
    y = weight_a[:, None] * y_a + weight_b[:, None] * y_b
    empty = s == 0
    s = tl.where(empty, 1.0, s)
    tl.store(y_ptr + at, (y / s[:, None]).to(y_ptr.dtype.element_ty), mask=keep_y)
    tl.store(lse_ptr + r, tl.where(empty, -float("inf"), m + tl.log(s)), mask=keep)


def merge_attention(
    y_a: Tensor, lse_a: Tensor, y_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge the results of attention over two sets of keys into that over both.

    Args:
        y_a: [N, H, D] fp32, bf16 or fp16, contiguous: attention over the first set.
        lse_a: [N, H] fp32, contiguous: log-sum-exp of its scores in nats; -inf = the set is
            empty for that row and head, and ``y_a`` may hold anything there.
        y_b: As ``y_a``, over the second set.
        lse_b: As ``lse_a``.

    Returns:
        y [N, H, D] like ``y_a`` and lse [N, H] in fp32. Where one set is empty, the bits of the
        other part on a GPU; where both are, zeros and -inf. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, or a tensor is not contiguous.
        TypeError: A dtype is not listed above.

    Example:
        >>> one, zero = torch.ones(1, 1, 2), torch.zeros(1, 1)
        >>> merge_attention(one, zero, 3 * one, zero)
        (tensor([[[2., 2.]]]), tensor([[0.6931]]))
    """
    fp32 = (torch.float32,)
    size = match(
        "merge_attention",
        y_a=(y_a, "N H D", FLOATS),
        lse_a=(lse_a, "N H", fp32),
        y_b=(y_b, "N H D", (y_a.dtype,)),
        lse_b=(lse_b, "N H", fp32),
    )
    for name, x in (("y_a", y_a), ("lse_a", lse_a), ("y_b", y_b), ("lse_b", lse_b)):
        if not x.is_contiguous():
            strides = f"strides {list(x.stride())}, expected a contiguous tensor"
            raise ValueError(f"merge_attention: {name} has {strides}; call .contiguous()")
    if runs_reference(y_a):
        y, lse = reference(y_a, lse_a, y_b, lse_b)
        return y, lse.to(torch.float32)
    y, lse = torch.empty_like(y_a), torch.empty_like(lse_a)
    rows, D = size["N"] * size["H"], size["D"]
    if rows:
        block_d = triton.next_power_of_2(D)
        block_r = max(1, BLOCK // block_d)
        grid = (triton.cdiv(rows, block_r),)
        _merge_kernel[grid](
            y_a, lse_a, y_b, lse_b, y, lse, rows,
            D=D, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return y, lse


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The weights of both parts vary; either part is empty in some rows, and both in one."""
    N, H, D = dims["N"], dims["H"], dims["D"]
    y_a, y_b = torch.randn(2, N, H, D, device=device)
    lse_a, lse_b = 30 + 2 * torch.randn(2, N, H, device=device)
    lse_a[1::4] = -torch.inf
    lse_b[2::4] = -torch.inf
    lse_a[3::4, 0] = lse_b[3::4, 0] = -torch.inf
    y_a[1::4] = torch.nan  # nobody looks
    return y_a.to(dtype), lse_a, y_b.to(dtype), lse_b


KERNEL = Kernel(
    fn=merge_attention,
    reference=reference,
    make=_make,
    tests=(
        {"N": 1, "H": 1, "D": 1},
        {"N": 7, "H": 3, "D": 24},
        {"N": 43, "H": 6, "D": 64},
    ),
    bench=({"N": 1024, "H": 32, "D": 128},),
    min_bytes=lambda d, dtype: d["N"] * d["H"] * 3 * (d["D"] * dtype.itemsize + 4),
)
