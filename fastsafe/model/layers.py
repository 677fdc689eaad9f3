"""The small operations of a decoder layer, in plain torch.

Each is a function of tensors alone, so that a fused kernel can take its place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """Divide each row by its root mean square and scale it.

    Args:
        x: [..., C] fp32, bf16 or fp16.
        weight: [C], dtype of ``x``.
        eps: Added to the mean square.
        one_plus: Multiply by 1 + weight instead, in fp32 as Gemma does.

    Returns:
        Shape and dtype of ``x``. Sums are fp32.
    """
    if one_plus:
        scaled = F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps)
        return scaled.to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [N, 2F], gate in the first half of the columns.

    Returns:
        [N, F].
    """
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh approximation of gelu.

    Args:
        gate_up: [N, 2F], gate in the first half of the columns.

    Returns:
        [N, F].
    """
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of every head; queries and keys may come side by side.

    Args:
        x: [N, heads, D].
        cos: [N, 1, R] with R <= D; both halves are equal.
        sin: [N, 1, R]; the first half is negated.

    Returns:
        [N, heads, D]; features beyond R are unchanged.
    """
    size = cos.shape[-1]
    turned = x[..., :size] if size < x.shape[-1] else x
    half = size // 2
    swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return torch.cat((turned, x[..., size:]), -1) if size < x.shape[-1] else turned


def softcap(x: Tensor, cap: float) -> Tensor:
    """Squash values smoothly into (-cap, cap)."""
    return torch.tanh(x / cap) * cap
