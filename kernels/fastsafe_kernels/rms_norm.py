"""Add a residual and divide each row by its root mean square.

    h[n] = residual[n] + residual_scale * x[n]          (h = x without a residual)
    r[n] = 1 / sqrt(mean_c h[n, c]^2 + eps)
    y[n, c] = h[n, c] * r[n] * w[c]                     (1 + w[c] when one_plus, as Gemma does)

h is rounded to its dtype before it is normalised: that is the row the next layer adds to. y is
rounded once, after the weight. Backward, with upstream gradients g of y and e of h:

    dh[n, c] = e[n, c] + r[n] * (g w - h r^2 mean_c(g w h))[n, c]
    dresidual = dh,     dx = residual_scale * dh,     dw[c] = sum_n (g h r)[n, c]

Shapes   x, residual [N, C], w [C]  ->  y, h [N, C]
Dtypes   x fp32, bf16 or fp16 and all others like x; r, partial sums of dw and every sum fp32
Cost     forward reads x and residual and writes h and y; backward reads g, h and e and writes dh;
         dw adds one fp32 row per ROWS rows, written and read
Source   Zhang & Sennrich 2019, arXiv:1910.07467
Used by  fastsafe.model (the norms of a decoder layer)
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# A row of up to LIMIT columns stays in registers between the sum and its use; a wider one is
# swept twice, in blocks. Short rows share a program until its tile has TILE values.
LIMIT = 8192
TILE = 1024
WIDE_BLOCK = 4096
# Rows behind one partial sum of dw: constants, so that rows are summed alike in any batch. At 32
# the partial sums move 3 % of the bytes that the rows of a bf16 model do.
DW_ROWS = 32
WIDE_DW_ROWS = 8


def reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch, in fp32 inside or in fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x
    if residual is not None:
        h = (residual.to(wide) + residual_scale * x.to(wide)).to(x.dtype)
    w = weight.to(wide) + 1 if one_plus else weight.to(wide)
    return F.rms_norm(h.to(wide), weight.shape, w, eps).to(x.dtype), h


@triton.jit
def _load_h(x_ptr, residual_ptr, keep, scale, RESIDUAL: tl.constexpr):
    x = tl.load(x_ptr, mask=keep, other=0.0)
    h = x.to(tl.float32)
    if RESIDUAL:
        h = tl.load(residual_ptr, mask=keep, other=0.0).to(tl.float32) + scale * h
    return h.to(x.dtype).to(tl.float32)


@triton.jit
def _load_weight(w_ptr, c, C, ONE_PLUS: tl.constexpr):
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if ONE_PLUS:
        w += 1.0
    return w


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    N,
    C,
    eps,
    scale,
    RESIDUAL: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    x_row, residual_row = x_ptr + n * x_stride, residual_ptr + n * residual_stride
    h = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, C if WIDE else BLOCK, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        keep = (n < N) & (c < C)
        h = _load_h(x_row + c, residual_row + c, keep, scale, RESIDUAL)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, 1) / C + eps)[:, None]
    tl.store(rstd_ptr + n, rstd, mask=n < N)
    for start in range(0, C if WIDE else BLOCK, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        keep = (n < N) & (c < C)
        if WIDE:
            h = _load_h(x_row + c, residual_row + c, keep, scale, RESIDUAL)
        y = h * rstd * _load_weight(w_ptr, c, C, ONE_PLUS)
        tl.store(y_ptr + n * C + c, y.to(y_ptr.dtype.element_ty), mask=keep)
        if RESIDUAL:
            tl.store(h_ptr + n * C + c, h.to(h_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr,
    e_ptr,
    h_ptr,
    w_ptr,
    rstd_ptr,
    dh_ptr,
    dx_ptr,
    partial_ptr,
    h_stride,
    N,
    C,
    scale,
    E: tl.constexpr,
    DX: tl.constexpr,
    DW: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    c = tl.arange(0, BLOCK)[None, :]
    w = _load_weight(w_ptr, c, C, ONE_PLUS)
    g = tl.zeros([STEP, BLOCK], tl.float32)
    normed = tl.zeros([STEP, BLOCK], tl.float32)
    dw = tl.zeros([STEP, BLOCK], tl.float32)
    partial_row = partial_ptr + p.to(tl.int64) * C
    # a single step has constant bounds: it compiles to no loop, with half of the registers
    for first in range(0, tl.minimum(N - p * ROWS, ROWS) if ROWS > STEP else STEP, STEP):
        n = (p * ROWS + first + tl.arange(0, STEP)).to(tl.int64)[:, None]
        rstd = tl.load(rstd_ptr + n, mask=n < N, other=0.0)
        products = tl.zeros([STEP, BLOCK], tl.float32)
        for start in range(0, C if WIDE else BLOCK, BLOCK):
            if WIDE:
                c = start + tl.arange(0, BLOCK)[None, :]
                w = _load_weight(w_ptr, c, C, ONE_PLUS)
            keep = (n < N) & (c < C)
            g = tl.load(g_ptr + n * C + c, mask=keep, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + n * h_stride + c, mask=keep, other=0.0)
            normed = h.to(tl.float32) * rstd
            products += g * w * normed
        along = tl.sum(products, 1)[:, None] / C
        for start in range(0, C if WIDE else BLOCK, BLOCK):
            if WIDE:
                c = start + tl.arange(0, BLOCK)[None, :]
                w = _load_weight(w_ptr, c, C, ONE_PLUS)
            keep = (n < N) & (c < C)
            at = n * C + c
            if WIDE:
                g = tl.load(g_ptr + at, mask=keep, other=0.0).to(tl.float32)
                h = tl.load(h_ptr + n * h_stride + c, mask=keep, other=0.0)
                normed = h.to(tl.float32) * rstd
            dh = rstd * (g * w - normed * along)
            if E:
                dh += tl.load(e_ptr + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=keep)
            if DX:
                tl.store(dx_ptr + at, (scale * dh).to(dx_ptr.dtype.element_ty), mask=keep)
            if DW and WIDE:
                tl.store(partial_row + c, tl.sum(g * normed, 0)[None, :], mask=c < C)
            elif DW:
                dw += g * normed
    if DW and not WIDE:
        tl.store(partial_row + c, tl.sum(dw, 0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=["P"])
def _sum_rows_kernel(partial_ptr, out_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + p * C + c, mask=(p < P) & (c < C), other=0.0)
    out = tl.sum(total, 0)[None, :].to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + c, out, mask=c < C)


def refuse_strides(op: str, args: Mapping[str, tuple[Tensor, str, Any]]) -> None:
    """Refuse arguments of ``match`` that are strided in their last dimension."""
    for name, (t, shape, _) in args.items():
        if t.stride(-1) != 1:
            stride = f"stride {t.stride(-1)} in {shape.split()[-1]}, expected 1"
            raise ValueError(f"{op}: {name} has {stride}; call .contiguous()")


def sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum [P, C] fp32 over its rows, in an order that P alone decides."""
    P, C = partial.shape
    total = torch.empty(C, dtype=dtype, device=partial.device)
    # 32 columns are one 128-byte line, and 4096 columns make 128 programs
    grid = (triton.cdiv(C, 32),)
    _sum_rows_kernel[grid](partial, total, P, C, BLOCK_P=128, BLOCK_C=32)
    return total


def _tile(C: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program, up to 16 values a thread: C alone decides."""
    block = triton.next_power_of_2(C) if C <= LIMIT else WIDE_BLOCK
    rows = min(16, max(1, TILE // block))
    return rows, block, max(4, block // 512)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        one_plus: bool,
        scale: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        N, C = x.shape
        other = x if residual is None else residual
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        h = x if residual is None else torch.empty_like(y)
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)
        rows, block, warps = _tile(C)
        if N:
            _forward_kernel[(triton.cdiv(N, rows),)](
                x, other, weight, y, h, rstd, x.stride(0), other.stride(0), N, C, eps, scale,
                RESIDUAL=residual is not None, ONE_PLUS=one_plus, WIDE=C > LIMIT,
                ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(h, weight, rstd)
        ctx.options = residual is not None, one_plus, scale
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        has_residual, one_plus, scale = ctx.options
        g, e = grads if has_residual else (grads[0], None)
        if g is None:  # nobody used y
            dx = e if e is None or scale == 1 else scale * e
            return dx, None, e, None, None, None
        g, e = g.contiguous(), None if e is None else e.contiguous()
        N, C = h.shape
        dh = torch.empty_like(g)
        dx = torch.empty_like(g) if has_residual and scale != 1 else dh
        trains, wide = ctx.needs_input_grad[1], C > LIMIT
        step, block, warps = _tile(C)
        if wide:
            step, block = WIDE_DW_ROWS, 512
        rows = step if wide or not trains else DW_ROWS
        programs = triton.cdiv(N, rows)
        partial = torch.empty(programs if trains else 0, C, dtype=torch.float32, device=g.device)
        if N:
            _backward_kernel[(programs,)](
                g, dh if e is None else e, h, weight, rstd, dh, dx, partial, h.stride(0), N, C,
                scale, E=e is not None, DX=dx is not dh, DW=trains, ONE_PLUS=one_plus, WIDE=wide,
                ROWS=rows, STEP=step, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        dw = sum_rows(partial, weight.dtype) if trains else None
        return dx, dw, dh if has_residual else None, None, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Add a residual to ``x`` and divide each row by its root mean square.

    Args:
        x: [N, C] fp32, bf16 or fp16, contiguous in C. Not modified.
        weight: [C] contiguous, dtype of ``x``.
        residual: [N, C] like ``x``; None adds nothing. Not modified.
        eps: Added to the mean square.
        one_plus: Multiply by 1 + weight instead, in fp32 as Gemma does.
        residual_scale: Of ``x`` before it is added to ``residual``; unused without one.

    Returns:
        The normalised rows and h, the sum that was normalised: ``x`` itself without a residual.
        Both [N, C] in the dtype of ``x``, differentiable once in ``x``, ``weight`` and
        ``residual``.

    Raises:
        ValueError: Shapes or devices disagree, or a tensor is strided in C.
        TypeError: A dtype is not listed above.

    Example:
        >>> x, ones = torch.tensor([[3.0, -4.0]]), torch.ones(2)
        >>> rms_norm(x, ones, residual=ones[None])
        (tensor([[ 1.1314, -0.8485]]), tensor([[ 4., -3.]]))
    """
    args = {"x": (x, "N C", FLOATS), "weight": (weight, "C", (x.dtype,))}
    if residual is not None:
        args["residual"] = (residual, "N C", (x.dtype,))
    match("rms_norm", **args)
    refuse_strides("rms_norm", args)
    if runs_reference(x):
        return reference(x, weight, residual, eps, one_plus, residual_scale)
    y = _RmsNorm.apply(x, weight, residual, eps, one_plus, residual_scale)
    return (y, x) if residual is None else y


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """An eps that is no rounding error of the mean square, in rows of different sizes."""
    N, C, one_plus = dims["N"], dims["C"], bool(dims["one_plus"])
    x = torch.randn(N, C, device=device) * torch.linspace(0.5, 2, N, device=device)[:, None]
    weight = 0.3 * torch.randn(C, device=device) + (0 if one_plus else 1)
    residual = torch.randn(N, C, device=device).to(dtype) if dims["residual"] else None
    scale = 0.22 if dims["scaled"] else 1.0
    return x.to(dtype), weight.to(dtype), residual, 0.05, one_plus, scale


def _point(N: int, C: int, flags: str = "") -> Dims:
    known = ("residual", "one_plus", "scaled")
    return {"N": N, "C": C} | {name: int(name in flags.split()) for name in known}


def _min_bytes(dims: Dims, dtype: torch.dtype) -> int:
    """Read x and write y; with a residual read that and write h as well."""
    return dims["N"] * dims["C"] * dtype.itemsize * (4 if dims["residual"] else 2)


KERNEL = Kernel(
    fn=rms_norm,
    reference=reference,
    make=_make,
    tests=(
        _point(1, 3),
        _point(21, 64, "one_plus"),
        _point(2, LIMIT + 1, "one_plus"),
        _point(3, LIMIT + 1, "residual scaled"),
        _point(DW_ROWS + 1, 997, "residual"),
        _point(DW_ROWS + 3, 257, "residual one_plus scaled"),
    ),
    bench=(
        _point(1024, 4096, "residual"),
        _point(16_384, 4096, "residual"),
        _point(16_384, 4096),
        _point(16_384, 3840, "one_plus"),
        _point(16_384, 4096, "residual scaled"),
        _point(4096, 8192, "residual"),
        _point(4096, 16_384, "residual"),
    ),
    min_bytes=_min_bytes,
    grads=(0, 1),
)
