"""The small operations of a decoder layer, differentiable.

On a CPU in fp32 they run on ``fastsafe.model.cpu_ops``, with their derivatives written out; any
other tensor takes the op of ``fastsafe_kernels``: its Triton kernel on a GPU, plain torch on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastsafe_kernels as ops
from fastsafe.model import cpu_ops

# torch's product of fewer rows may take another code path of the BLAS, with other bits
MIN_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` [M, I] by the transpose of ``weight`` [O, I] and add ``bias`` [O].

    On a CPU a row's bits do not depend on the number of rows.
    """
    if not cpu_ops.runs_natively(x):
        rows = len(x)
        if not x.is_cpu or rows == 0 or rows >= MIN_ROWS:
            return F.linear(x, weight, bias)
        x = torch.cat([x, x[-1:].expand(MIN_ROWS - rows, -1)])
        return F.linear(x, weight, bias)[:rows]
    if _is_recorded(x, weight, bias):
        y: Tensor = _CpuLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return cpu_ops.linear(x, weight, bias)


class _CpuLinear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return cpu_ops.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        return (
            cpu_ops.linear(dy, weight.T) if ctx.needs_input_grad[0] else None,
            cpu_ops.linear(dy.T, x.T) if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.needs_input_grad[2] else None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """Divide each row by its root mean square and scale it.

    Args:
        x: [..., C] fp32, bf16 or fp16.
        weight: [C], dtype of ``x``.
        eps: Added to the mean square.
        one_plus: Multiply by 1 + weight instead, in fp32 as Gemma does.

    Returns:
        Shape and dtype of ``x``. Sums are fp32. Differentiable in both.
    """
    if cpu_ops.runs_natively(x):
        if _is_recorded(x, weight):
            y: Tensor = _CpuNorm.apply(x, None, weight, eps, one_plus, 1.0)[0]  # type: ignore[no-untyped-call]
            return y
        return cpu_ops.norm(x, weight, eps, one_plus)[0]
    rows = x.reshape(-1, x.shape[-1])
    return ops.rms_norm(rows, weight, None, eps, one_plus)[0].view(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    one_plus: bool = False,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Add and norm: h = residual + alpha x, of the shape of both; see ``rms_norm``.

    Returns:
        The norm of h, and h.
    """
    if not cpu_ops.runs_natively(x):
        return ops.rms_norm(x, weight, residual, eps, one_plus, alpha)
    if _is_recorded(x, residual, weight):
        y, h = _CpuNorm.apply(x, residual, weight, eps, one_plus, alpha)  # type: ignore[no-untyped-call]
        return y, h
    return cpu_ops.norm(x, weight, eps, one_plus, residual, alpha)[:2]


class _CpuNorm(torch.autograd.Function):
    """y = h r w with h = residual + alpha x and r = 1 / rms(h); w may be 1 + w."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        one_plus: bool,
        alpha: float,
    ) -> tuple[Tensor, Tensor | None]:
        y, h, scale = cpu_ops.norm(x, weight, eps, one_plus, residual, alpha)
        ctx.save_for_backward(h, scale, weight)
        ctx.one_plus, ctx.alpha, ctx.adds = one_plus, alpha, residual is not None
        ctx.set_materialize_grads(False)
        return y, h if ctx.adds else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        h, scale, weight = ctx.saved_tensors
        dy, dh = grads
        if dy is None:  # y is unused
            assert dh is not None
            return (dh * ctx.alpha, dh, None, None, None, None)
        d = cpu_ops.norm_backward(dy, dh, h, scale, weight, ctx.one_plus)
        dw = None
        if ctx.needs_input_grad[2]:
            dw = (dy * h * scale.unsqueeze(-1)).reshape(-1, h.shape[-1]).sum(0)
        if not ctx.adds:
            return d, None, dw, None, None, None
        return d if ctx.alpha == 1.0 else d * ctx.alpha, d, dw, None, None, None


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """Compute activation(gate) * up of [N, 2F], gate in the first half of the columns -> [N, F].

    The activation is "silu" or "gelu_tanh", the tanh approximation of gelu.
    """
    if not cpu_ops.runs_natively(gate_up):
        return ops.gated(gate_up, activation)
    gelu = activation == "gelu_tanh"
    if _is_recorded(gate_up):
        y: Tensor = _CpuGated.apply(gate_up, gelu)  # type: ignore[no-untyped-call]
        return y
    return cpu_ops.gated(gate_up, gelu)


class _CpuGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return cpu_ops.gated(gate_up, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return cpu_ops.gated_backward(grads[0], gate_up, ctx.gelu), None


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
) -> Tensor:
    """Rotate the leading features of every head; queries and keys may come side by side.

    Args:
        x: [N, heads, D].
        cos: [N, 1, R] with R <= D; both halves are equal.
        sin: [N, 1, R]; the first half is negated.
        norm: [D], weight of an RMS norm of every head before; see ``rms_norm``.
        eps: Of the norm.
        one_plus: Of the norm.

    Returns:
        [N, heads, D]; features beyond R are not rotated. Differentiable in ``x`` and ``norm``.
    """
    if not cpu_ops.runs_natively(x):
        return ops.rope(x, cos[:, 0], sin[:, 0], norm, eps, one_plus)
    if norm is not None:
        x = rms_norm(x, norm, eps, one_plus)
    if _is_recorded(x):
        rotated: Tensor = _CpuRope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    return cpu_ops.rope(x, cos, sin)


class _CpuRope(torch.autograd.Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpu_ops.rope(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return cpu_ops.rope(grads[0], cos, sin, inverse=True), None, None


def softcap(x: Tensor, cap: float) -> Tensor:
    """Squash values smoothly into (-cap, cap)."""
    return torch.tanh(x / cap) * cap


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Return whether autograd records an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
