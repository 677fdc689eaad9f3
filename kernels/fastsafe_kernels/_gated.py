"""The kernels behind ``swiglu`` and ``geglu``: both gates are a times a sigmoid of v(a).

    silu(a) = a sigmoid(a),    gelu(a) = a sigmoid(2 t(a)) with t(a) = sqrt(2/pi) (a + 0.044715 a^3)

since (1 + tanh(t)) / 2 = sigmoid(2 t): with s = sigmoid(v(a)), and so s' = s (1 - s) v'(a),

    y = a s b,    da = g b (s + a s'),    db = g a s

where a is the gate, b the other half and g the gradient of y. Elementwise: no row sees another.
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, match
from ._triton import tl, triton

TILE = 2048  # values of y in a program: 16 per thread, two 128-bit loads of each half in 16 bits


@triton.jit
def _gate(a, GELU: tl.constexpr):
    """Sigmoid of v(a), and v'(a)."""
    if GELU:
        # 2 sqrt(2 / pi), and 0.044715 of it
        v = a * (1.5957691216057308 + 0.07135481627260025 * a * a)
        slope = 1.5957691216057308 + 3 * 0.07135481627260025 * a * a
    else:
        v, slope = a, 1.0
    return 1 / (1 + tl.exp(-v)), slope


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_ptr,
    y_ptr,
    x_stride,
    N,
    F,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    f = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    keep = (n < N) & (f < F)
    a = tl.load(x_ptr + n * x_stride + f, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + n * x_stride + F + f, mask=keep, other=0.0).to(tl.float32)
    s, _ = _gate(a, GELU)
    tl.store(y_ptr + n * F + f, (a * s * b).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr,
    x_ptr,
    dx_ptr,
    x_stride,
    N,
    F,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    f = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    keep = (n < N) & (f < F)
    g = tl.load(g_ptr + n * F + f, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + n * x_stride + f, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + n * x_stride + F + f, mask=keep, other=0.0).to(tl.float32)
    s, slope = _gate(a, GELU)
    da = g * b * s * (1 + a * (1 - s) * slope)
    at = dx_ptr + n * 2 * F + f
    tl.store(at, da.to(dx_ptr.dtype.element_ty), mask=keep)
    tl.store(at + F, (g * a * s).to(dx_ptr.dtype.element_ty), mask=keep)


def _launch(N: int, F: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile; short rows share a program."""
    block = min(TILE, triton.next_power_of_2(F))
    rows = TILE // block
    # rows come first in the grid: its second axis ends at 65535
    return (triton.cdiv(N, rows), triton.cdiv(F, block)), {"ROWS": rows, "BLOCK": block}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool) -> Tensor:
        N, F = x.shape[0], x.shape[1] // 2
        y = torch.empty(N, F, dtype=x.dtype, device=x.device)
        if y.numel():
            grid, tile = _launch(N, F)
            _forward_kernel[grid](x, y, x.stride(0), N, F, GELU=gelu, **tile, num_warps=4)
        ctx.save_for_backward(x)
        ctx.gelu = gelu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        g = grads[0].contiguous()
        N, F = g.shape
        dx = torch.empty(N, 2 * F, dtype=x.dtype, device=x.device)
        if g.numel():
            grid, tile = _launch(N, F)
            strides = (x.stride(0), N, F)
            _backward_kernel[grid](g, x, dx, *strides, GELU=ctx.gelu, **tile, num_warps=4)
        return dx, None


def check(op: str, gate_up: Tensor) -> None:
    """Refuse what cannot be halved or is strided in a row."""
    width = match(op, gate_up=(gate_up, "N C", FLOATS))["C"]
    if width % 2:
        raise ValueError(f"{op}: gate_up is {list(gate_up.shape)}, expected [N, 2F]")
    if gate_up.stride(1) != 1:
        stride = f"stride {gate_up.stride(1)} in F, expected 1"
        raise ValueError(f"{op}: gate_up has {stride}; call .contiguous()")


def launch(gate_up: Tensor, *, gelu: bool) -> Tensor:
    """Run the kernels, differentiably."""
    y: Tensor = _Gated.apply(gate_up, gelu)
    return y


def make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Gates from where they are shut to where they are open."""
    N, F = dims["N"], dims["F"]
    gate = torch.randn(N, F, device=device) + torch.linspace(-6, 4, F, device=device)
    return (torch.cat((gate, torch.randn(N, F, device=device)), -1).to(dtype),)


def min_bytes(dims: Dims, dtype: torch.dtype) -> int:
    """Read both halves and write y."""
    return 3 * dims["N"] * dims["F"] * dtype.itemsize


# one column; rows that share a program and end within it; one past a block
TESTS: tuple[Dims, ...] = ({"N": 1, "F": 1}, {"N": 19, "F": 251}, {"N": 2, "F": TILE + 1})
