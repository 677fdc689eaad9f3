"""Log-probability of one token per hidden state, without the logits of all rows in memory.

    z[t, v] = hidden[t] . head[v] / scale,  softcapped: z = cap * tanh(z / cap)
    y[t] = z[t, target[t]] - log sum_v exp z[t, v]

Backward, with upstream gradient g, before scale and cap:

    dz[t, v] = g[t] * ([v = target[t]] - exp(z[t, v] - lse[t])),    dhidden[t] = dz[t] . head

Rows do not mix, so dhidden[t] is g[t] times its value for g[t] = 1. That one is computed in the
forward pass, where the logits are at hand, and only when ``hidden`` requires a gradient.

Shapes   hidden [T, E], head [V, E], target [T]  ->  y [T]
Dtypes   hidden and head one of fp32, bf16, fp16; target int64; y and sums fp32; dhidden like hidden
Cost     2 T E V operations, 4 T E V with the gradient; CHUNK logits rows in memory (``_head.py``)
Source   Milakov & Gimelshein 2018, arXiv:1805.02867 (the running sum); Hsu et al. 2024,
         arXiv:2410.10989 (the gradient in the forward pass)
Used by  fastsafe.train
"""

from typing import Any

import torch
from torch import Tensor

from ._head import BLOCK, check, logits, through_head
from ._spec import Dims, Kernel, runs_reference


def reference(
    hidden: Tensor, head: Tensor, targets: Tensor, logits_scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Define the op in plain torch."""
    z = logits(hidden, head, logits_scale, softcap)
    return z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float, cap: float
    ) -> Tensor:
        # the loss w * -y has dy as its gradient at w = -1
        minus = torch.full(targets.shape, -1.0, dtype=torch.float32, device=hidden.device)
        y, _, unit = through_head(hidden, head, targets, scale, cap, minus)
        ctx.save_for_backward(unit)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (unit,) = ctx.saved_tensors
        return (unit * grads[0][:, None]).to(unit.dtype), None, None, None, None


def linear_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, logits_scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Log-probability of ``targets[t]`` under the softmax of a frozen head's logits.

    A row's bits depend on that row alone, if the library behind ``torch.mm`` treats the rows of
    a product alike.

    Args:
        hidden: [T, E] fp32, bf16 or fp16, contiguous in E.
        head: [V, E] in the same dtype, contiguous in E; gets no gradient.
        targets: [T] int64 in [0, V). The range is not checked: on a GPU that would cost a
            synchronisation.
        logits_scale: Logits are divided by it.
        softcap: Bound of the logits, applied after the scale; 0 for none.

    Returns:
        [T] fp32, in nats, at most 0. Differentiable in ``hidden``, once.

    Raises:
        ValueError: Shapes or devices disagree, a stride is wrong, ``head`` requires a gradient,
            ``logits_scale`` is not positive or ``softcap`` is negative.
        TypeError: A dtype is not listed above.

    Example:
        >>> linear_logprobs(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])
    """
    check("linear_logprobs", hidden, head, targets, logits_scale, softcap)
    if runs_reference(hidden):
        return reference(hidden, head, targets, logits_scale, softcap)
    targets = targets.contiguous()
    if torch.is_grad_enabled() and hidden.requires_grad:
        y: Tensor = _LinearLogprobs.apply(hidden, head, targets, logits_scale, softcap)
        return y
    return through_head(hidden, head, targets, logits_scale, softcap, None)[0]


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Likely and unlikely targets; logits of about 4, which a cap of 5 bends."""
    T, E, V = dims["T"], dims["E"], dims["V"]
    hidden = torch.randn(T, E, device=device, dtype=dtype)
    head = (4 * E**-0.5 * torch.randn(V, E, device=device)).to(dtype)
    targets = torch.randint(V, (T,), device=device)
    scale, cap = (2.0, 5.0) if dims["capped"] else (1.0, 0.0)
    return hidden, head, targets, scale, cap


KERNEL = Kernel(
    fn=linear_logprobs,
    reference=reference,
    make=_make,
    tests=(
        {"T": 1, "E": 16, "V": 3, "capped": 0},
        {"T": 3, "E": 32, "V": 2 * BLOCK + 1, "capped": 0},
        {"T": 7, "E": 64, "V": 997, "capped": 1},
    ),
    bench=(
        {"T": 4096, "E": 4096, "V": 128_256, "capped": 0},
        {"T": 4096, "E": 3584, "V": 256_000, "capped": 1},
    ),
    min_bytes=lambda d, dtype: (d["T"] + d["V"]) * d["E"] * dtype.itemsize,
    flops=lambda d: 2 * d["T"] * d["E"] * d["V"],
    grads=(0,),
)
