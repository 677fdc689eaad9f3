"""The small operations of a decoder layer, in plain torch.

Each is a function of tensors alone, so that a fused kernel can take its place. Where autograd's
own backward pass does needless work on frozen weights, the derivative is written out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDE = (torch.float32, torch.float64)  # sums need no other dtype


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
    if one_plus:
        scaled = rms_norm(x.float(), 1.0 + weight.float(), eps)
        return scaled.to(x.dtype)
    if x.dtype in _WIDE and x.requires_grad and torch.is_grad_enabled():
        normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / rms(x); dx = r (g w - x r^2 mean(g w x)).

    Half of autograd's time: it differentiates power, mean and root one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        scaled = grads[0] * weight
        along = (scaled * x).mean(-1, keepdim=True).mul_(r).mul_(r)
        dx = torch.addcmul(scaled, x, along, value=-1).mul_(r)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, (grads[0] * x * r).flatten(0, -2).sum(0), None


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [N, 2F], gate in the first half of the columns.

    Returns:
        [N, F].
    """
    gate, up = gate_up.chunk(2, -1)
    return _times(F.silu(gate), up)


def geglu(gate_up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh approximation of gelu.

    Args:
        gate_up: [N, 2F], gate in the first half of the columns.

    Returns:
        [N, F].
    """
    gate, up = gate_up.chunk(2, -1)
    return _times(F.gelu(gate, approximate="tanh"), up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of every head; queries and keys may come side by side.

    Args:
        x: [N, heads, D].
        cos: [N, 1, R] with R <= D; both halves are equal.
        sin: [N, 1, R]; the first half is negated.

    Returns:
        [N, heads, D]; features beyond R are unchanged. Differentiable in ``x``.
    """
    if x.requires_grad and torch.is_grad_enabled():
        turned: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return turned
    return _rotate(x, cos, sin)


class _Rope(torch.autograd.Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def softcap(x: Tensor, cap: float) -> Tensor:
    """Squash values smoothly into (-cap, cap)."""
    return torch.tanh(x / cap) * cap


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size, half = cos.shape[-1], cos.shape[-1] // 2
    turned = x if size == x.shape[-1] else x[..., :size]
    swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
    turned = torch.mul(turned, cos).addcmul_(swapped, sin)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)


def _times(fresh: Tensor, other: Tensor) -> Tensor:
    """Multiply, in the memory of ``fresh`` unless autograd needs it."""
    if torch.is_grad_enabled() and (fresh.requires_grad or other.requires_grad):
        return fresh * other
    return fresh.mul_(other)
