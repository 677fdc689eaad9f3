"""Multiply by a gated unit: silu(gate) * up, or gelu(gate) * up with gelu's tanh approximation.

    y[n, f] = a s b        with gate a = x[n, f], b = x[n, F + f] and s = sigmoid(v(a))

    silu:       v(a) = a
    gelu_tanh:  v(a) = 2 sqrt(2 / pi) (a + 0.044715 a^3),    since (1 + tanh(t)) / 2 = sigmoid(2 t)

Backward, with upstream gradient g:

    dx[n, f] = g b s (1 + a (1 - s) v'(a)),        dx[n, F + f] = g a s

Shapes   x [N, 2F]  ->  y [N, F]
Dtypes   x fp32, bf16 or fp16; y and dx like x; arithmetic fp32, rounded once
Cost     forward reads x and writes y; backward reads g and x and writes dx: nothing else is kept
Source   Shazeer 2020, arXiv:2002.05202 (without its matrices); Hendrycks & Gimpel 2016,
         arXiv:1606.08415
Used by  fastsafe.model (the MLP; gelu_tanh is Gemma's)
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

ACTIVATIONS = ("silu", "gelu_tanh")
TILE = 2048  # values of y in a program: 16 per thread, two 128-bit loads of each half in 16 bits


def reference(gate_up: Tensor, activation: str) -> Tensor:
    """Define the op in plain torch, in fp32 inside or in fp64 for fp64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    if activation == "silu":
        return (functional.silu(gate) * up).to(gate_up.dtype)
    return (functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


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
    """Choose the grid and the tile; short rows share a program."""
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
            _backward_kernel[grid](g, x, dx, x.stride(0), N, F, GELU=ctx.gelu, **tile, num_warps=4)
        return dx, None


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """Compute silu(gate) * up, or gelu(gate) * up with the tanh approximation of gelu.

    Args:
        gate_up: [N, 2F] fp32, bf16 or fp16, contiguous in a row; the gate is the first half of
            the columns. Not modified.
        activation: "silu" or "gelu_tanh".

    Returns:
        [N, F] contiguous, dtype of ``gate_up``. Differentiable, once.

    Raises:
        ValueError: ``gate_up`` is not a matrix, has an odd width, or is strided in a row, or the
            activation is another.
        TypeError: Its dtype is not listed above.

    Example:
        >>> gated(torch.tensor([[0.0, 10.0, 3.0, 3.0]]), "silu")
        tensor([[ 0.0000, 29.9986]])
    """
    if match("gated", gate_up=(gate_up, "N C", FLOATS))["C"] % 2:
        raise ValueError(f"gated: gate_up is {list(gate_up.shape)}, expected [N, 2F]")
    if gate_up.stride(1) != 1:
        stride = f"stride {gate_up.stride(1)} in F, expected 1"
        raise ValueError(f"gated: gate_up has {stride}; call .contiguous()")
    if activation not in ACTIVATIONS:
        known = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"gated: activation is {activation!r}, expected {known}")
    if runs_reference(gate_up):
        return reference(gate_up, activation)
    y: Tensor = _Gated.apply(gate_up, activation == "gelu_tanh")
    return y


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, str]:
    """Make gates from where they are shut to where they are open."""
    N, F = dims["N"], dims["F"]
    gate = torch.randn(N, F, device=device) + torch.linspace(-6, 4, F, device=device)
    gate_up = torch.cat((gate, torch.randn(N, F, device=device)), -1).to(dtype)
    return gate_up, ACTIVATIONS[dims["gelu"]]


def _min_bytes(dims: Dims, dtype: torch.dtype) -> int:
    """Read both halves and write y."""
    return 3 * dims["N"] * dims["F"] * dtype.itemsize


# one column; rows that share a program and end within it; one past a block
_SIZES = ({"N": 1, "F": 1}, {"N": 19, "F": 251}, {"N": 2, "F": TILE + 1})

KERNEL = Kernel(
    fn=gated,
    reference=reference,
    make=_make,
    tests=tuple(size | {"gelu": gelu} for gelu in (0, 1) for size in _SIZES),
    bench=(
        {"N": 1024, "F": 14_336, "gelu": 0},
        {"N": 16_384, "F": 14_336, "gelu": 0},
        {"N": 16_384, "F": 9728, "gelu": 0},
        {"N": 1024, "F": 14_336, "gelu": 1},
        {"N": 16_384, "F": 14_336, "gelu": 1},
        {"N": 16_384, "F": 10_240, "gelu": 1},
    ),
    min_bytes=_min_bytes,
    grads=(0,),
)
