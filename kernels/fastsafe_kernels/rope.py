"""Rotate queries or keys by their position, after an optional norm of every head.

    z = x, or x[n, h] / rms(x[n, h]) * w                (1 + w when one_plus, as Gemma does)
    y[.., i]       = z[.., i] c[n, i]       - z[.., i + R/2] s[n, i]        0 <= i < R/2
    y[.., i + R/2] = z[.., i + R/2] c[n, i] + z[.., i] s[n, i]
    y[.., j]       = z[.., j]                                               R <= j < D

with c, s the second halves of cos and sin: in transformers both halves are equal, and where a
table holds -sin in its first half (fastsafe.model.rope) the second is still sin. Backward, with
upstream gradient g, rotates back and goes through the norm (r = 1 / rms, z' = x r):

    dz[.., i] = g[.., i] c + g[.., i + R/2] s,    dz[.., i + R/2] = g[.., i + R/2] c - g[.., i] s
    dx = r (dz w - z' mean_d(dz w z')),           dw[d] = sum_nh (dz z')[n, h, d]

Shapes   x [N, H, D], cos, sin [N, R], w [D]  ->  y [N, H, D]; R even, R <= D
Dtypes   x fp32, bf16 or fp16; w like x; cos, sin fp32 or like x; y is rounded once, at the end
Cost     forward reads x and writes y; backward reads g (x too, for the norm) and writes dx
Source   Su et al. 2021, arXiv:2104.09864, in the pairing (i, i + R/2) of GPT-NeoX
Used by  fastsafe.model (training); rope_kv_write shares its tiles and arithmetic
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton
from .rms_norm import refuse_strides, sum_rows

TILE = 2048  # values of one token in a program: 16 per thread, two 128-bit loads in 16 bits
DW_TOKENS = 16  # behind one partial sum of dw: a constant, so that tokens are summed alike


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
) -> Tensor:
    """Define the op in plain torch, in fp32 inside or in fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z, half = x.to(wide), cos.shape[-1] // 2
    if norm_weight is not None:
        w = norm_weight.to(wide) + 1 if one_plus else norm_weight.to(wide)
        z = F.rms_norm(z, w.shape, w, eps)
    c, s = cos[:, None, half:].to(wide), sin[:, None, half:].to(wide)
    first, second, rest = z.tensor_split((half, 2 * half), -1)
    turned = (first * c - second * s, second * c + first * s, rest)
    return torch.cat(turned, -1).to(x.dtype)


@triton.jit
def load_parts(x_ptr, keep, HALF: tl.constexpr, D: tl.constexpr, I: tl.constexpr, J: tl.constexpr):
    """Both halves of what turns and the rest: [.., I], [.., I], [.., J], padded with 0, fp32."""
    i, j = tl.arange(0, I)[None, :], 2 * HALF + tl.arange(0, J)[None, :]
    first = tl.load(x_ptr + i, mask=keep & (i < HALF), other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + i, mask=keep & (i < HALF), other=0.0).to(tl.float32)
    rest = tl.zeros([first.shape[0], J], tl.float32)
    if D > 2 * HALF:
        rest = tl.load(x_ptr + j, mask=keep & (j < D), other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def load_norm_weight(
    w_ptr,
    ONE_PLUS: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    """What ``load_parts`` loads, of the norm's weight: one row."""
    every = tl.full([1, 1], True, tl.int1)
    first, second, rest = load_parts(w_ptr, every, HALF, D, I, J)
    if ONE_PLUS:
        first, second, rest = first + 1.0, second + 1.0, rest + 1.0
    return first, second, rest


@triton.jit
def store_parts(y_ptr, first, second, rest, keep, HALF: tl.constexpr, D: tl.constexpr):
    """Round and store what ``load_parts`` loads."""
    i = tl.arange(0, first.shape[1])[None, :]
    j = 2 * HALF + tl.arange(0, rest.shape[1])[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + i, first.to(dtype), mask=keep & (i < HALF))
    tl.store(y_ptr + HALF + i, second.to(dtype), mask=keep & (i < HALF))
    if D > 2 * HALF:
        tl.store(y_ptr + j, rest.to(dtype), mask=keep & (j < D))


@triton.jit
def load_angle(table_ptr, HALF: tl.constexpr, I: tl.constexpr):
    """One token's cos or sin: [1, I] from the second half of its row."""
    i = tl.arange(0, I)[None, :]
    return tl.load(table_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(first, second, rest, eps, D: tl.constexpr):
    """1 / rms of each head: [heads, 1]."""
    squares = tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)
    return tl.rsqrt(squares / D + eps)[:, None]


@triton.jit
def rotate(first, second, c, s):
    """Turn the pairs (first, second) by one token's angles."""
    return first * c - second * s, second * c + first * s


@triton.jit
def _forward_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    w_ptr,
    y_ptr,
    x_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    H,
    eps,
    NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    keep = h < H
    x_row = x_ptr + n * x_stride + h * x_head_stride
    first, second, rest = load_parts(x_row, keep, HALF, D, I, J)
    if NORM:
        w_first, w_second, w_rest = load_norm_weight(w_ptr, ONE_PLUS, HALF, D, I, J)
        r = inverse_rms(first, second, rest, eps, D)
        first, second, rest = first * r * w_first, second * r * w_second, rest * r * w_rest
    c = load_angle(cos_ptr + n * cos_stride, HALF, I)
    s = load_angle(sin_ptr + n * sin_stride, HALF, I)
    first, second = rotate(first, second, c, s)
    store_parts(y_ptr + (n * H + h) * D, first, second, rest, keep, HALF, D)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    w_ptr,
    dx_ptr,
    partial_ptr,
    x_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    N,
    H,
    eps,
    NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    DW: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    p = tl.program_id(0)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    keep = h < H
    if NORM:
        w_first, w_second, w_rest = load_norm_weight(w_ptr, ONE_PLUS, HALF, D, I, J)
    dw_first = tl.zeros([HEADS, I], tl.float32)
    dw_second = tl.zeros([HEADS, I], tl.float32)
    dw_rest = tl.zeros([HEADS, J], tl.float32)
    for token in range(0, tl.minimum(N - p * TOKENS, TOKENS) if TOKENS > 1 else 1):
        n = (p * TOKENS + token).to(tl.int64)
        at = (n * H + h) * D
        c = load_angle(cos_ptr + n * cos_stride, HALF, I)
        s = load_angle(sin_ptr + n * sin_stride, HALF, I)
        first, second, rest = load_parts(g_ptr + at, keep, HALF, D, I, J)
        first, second = rotate(first, second, c, -s)
        if NORM:
            x_row = x_ptr + n * x_stride + h * x_head_stride
            x_first, x_second, x_rest = load_parts(x_row, keep, HALF, D, I, J)
            r = inverse_rms(x_first, x_second, x_rest, eps, D)
            x_first, x_second, x_rest = x_first * r, x_second * r, x_rest * r
            if DW:
                dw_first += first * x_first
                dw_second += second * x_second
                dw_rest += rest * x_rest
            first, second, rest = first * w_first, second * w_second, rest * w_rest
            along = tl.sum(first * x_first + second * x_second, 1) + tl.sum(rest * x_rest, 1)
            along = along[:, None] / D
            first = r * (first - x_first * along)
            second = r * (second - x_second * along)
            rest = r * (rest - x_rest * along)
        store_parts(dx_ptr + at, first, second, rest, keep, HALF, D)
    if DW:
        partial_row = partial_ptr + (p * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * D
        dw_first, dw_second = tl.sum(dw_first, 0)[None, :], tl.sum(dw_second, 0)[None, :]
        dw_rest = tl.sum(dw_rest, 0)[None, :]
        every = tl.full([1, 1], True, tl.int1)
        store_parts(partial_row, dw_first, dw_second, dw_rest, every, HALF, D)


def tiles(R: int, D: int) -> dict[str, int]:
    """Tile of a program, by the shape of a head alone: rope_kv_write must sum in the same order."""
    heads = max(1, TILE // triton.next_power_of_2(D))
    block, rest = triton.next_power_of_2(R // 2), triton.next_power_of_2(max(D - R, 1))
    return {"HALF": R // 2, "D": D, "HEADS": heads, "I": block, "J": rest, "num_warps": 4}


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, w: Tensor | None, eps: float, one_plus: bool
    ) -> Tensor:
        N, H, D = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        shape = tiles(cos.shape[1], D)
        grid = (N, triton.cdiv(H, shape["HEADS"]))
        if y.numel():
            _forward_kernel[grid](
                x, cos, sin, x if w is None else w, y,
                x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), H, eps,
                NORM=w is not None, ONE_PLUS=one_plus, **shape,
            )  # fmt: skip
        # without a norm the gradient does not depend on x
        ctx.save_for_backward(None if w is None else x, cos, sin, w)
        ctx.x_strides, ctx.eps, ctx.one_plus = x.stride(), eps, one_plus
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, w = ctx.saved_tensors
        g = grads[0].contiguous()
        N, H, D = g.shape
        dx, trains = torch.empty_like(g), w is not None and ctx.needs_input_grad[3]
        tokens = DW_TOKENS if trains else 1
        shape = tiles(cos.shape[1], D)
        grid = (triton.cdiv(N, tokens), triton.cdiv(H, shape["HEADS"]))
        partial_rows = grid[0] * grid[1] if trains else 0
        partial = torch.empty(partial_rows, D, dtype=torch.float32, device=g.device)
        if g.numel():
            _backward_kernel[grid](
                g, g if x is None else x, cos, sin, g if w is None else w, dx, partial,
                ctx.x_strides[0], ctx.x_strides[1], cos.stride(0), sin.stride(0), N, H, ctx.eps,
                NORM=w is not None, ONE_PLUS=ctx.one_plus, DW=trains, TOKENS=tokens, **shape,
            )  # fmt: skip
        return dx, None, None, sum_rows(partial, w.dtype) if trains else None, None, None


def refuse_width(op: str, cos: Tensor, D: int) -> None:
    """Refuse tables that do not fit a head of D features."""
    R = cos.shape[1]
    if R % 2 or not 0 < R <= D:
        raise ValueError(f"{op}: cos is {list(cos.shape)}, expected an even R up to D={D}")


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
) -> Tensor:
    """Rotate every head of ``x`` by its token's angles.

    Args:
        x: [N, H, D] fp32, bf16 or fp16, contiguous in D; strides of N and H are free, so that
            it may be a part of a fused projection. Not modified.
        cos: [N, R] fp32 or the dtype of ``x``, R even and at most D, contiguous in R. Only the
            second half of a row is read; it belongs to the pairs (i, i + R/2).
        sin: [N, R] like ``cos``.
        norm_weight: [D] contiguous, dtype of ``x``: heads are divided by their root mean square
            and multiplied by it first (qk-norm). None: they are not.
        eps: Added to the mean square.
        one_plus: Multiply by 1 + norm_weight instead, in fp32 as Gemma does.

    Returns:
        [N, H, D] contiguous, dtype of ``x``; features from R on are not rotated.
        Differentiable in ``x`` and ``norm_weight``, once.

    Raises:
        ValueError: Shapes or devices disagree, R does not fit, or a last dimension is strided.
        TypeError: A dtype is not listed above.

    Example:
        >>> quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])  # cos, sin
        >>> rope(torch.tensor([[[3.0, 4.0]]]), *quarter)
        tensor([[[-4.,  3.]]])
    """
    tables = tuple(dict.fromkeys((x.dtype, torch.float32)))
    args = {"x": (x, "N H D", FLOATS), "cos": (cos, "N R", tables), "sin": (sin, "N R", tables)}
    if norm_weight is not None:
        args["norm_weight"] = (norm_weight, "D", (x.dtype,))
    size = match("rope", **args)
    refuse_width("rope", cos, size["D"])
    refuse_strides("rope", args)
    if runs_reference(x):
        return reference(x, cos, sin, norm_weight, eps, one_plus)
    y: Tensor = _Rope.apply(x, cos, sin, norm_weight, eps, one_plus)
    return y


def make_tables(N: int, R: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make cos and sin [N, R] fp32 of random angles."""
    angles = 10 * torch.randn(N, R // 2, device=device)
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """An eps that is no rounding error of the mean square; tables as a model holds them."""
    N, H, D, one_plus = dims["N"], dims["H"], dims["D"], bool(dims["one_plus"])
    cos, sin = make_tables(N, dims["R"], device)
    x = torch.randn(N, H, D, device=device).to(dtype)
    w = 0.3 * torch.randn(D, device=device) + (0 if one_plus else 1)
    return x, cos.to(dtype), sin.to(dtype), w.to(dtype) if dims["norm"] else None, 0.05, one_plus


def _point(N: int, H: int, D: int, R: int, norm: int = 0, one_plus: int = 0) -> Dims:
    return {"N": N, "H": H, "D": D, "R": R, "norm": norm, "one_plus": one_plus}


KERNEL = Kernel(
    fn=rope,
    reference=reference,
    make=_make,
    tests=(
        _point(1, 1, 2, 2),
        _point(3, 17, 128, 128, norm=1),
        _point(5, 3, 80, 32),
        _point(3, 5, 96, 96, norm=1, one_plus=1),
        _point(DW_TOKENS + 1, 2, 48, 20, norm=1),
    ),
    bench=(
        _point(1024, 32, 128, 128),
        _point(16_384, 32, 128, 128),
        _point(16_384, 32, 128, 128, norm=1),
        _point(16_384, 8, 256, 256, norm=1, one_plus=1),
        _point(16_384, 32, 96, 72),
    ),
    min_bytes=lambda d, dtype: d["N"] * (2 * d["H"] * d["D"] + d["R"]) * dtype.itemsize,
    grads=(0,),
)
