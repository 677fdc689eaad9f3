"""Weighted cross-entropy of hidden states, with a KL divergence to a second model if asked for.

    z[t, v] = hidden[t] . head[v] / scale,  softcapped: z = cap * tanh(z / cap)
    p[t] = softmax z[t]
    loss = sum_t w[t] * -log p[t, target[t]]  +  sum_t k[t] * sum_v q[t, v] * log(q[t, v] / p[t, v])

q is p of ``kl_hidden``, states of a frozen model through the same head: the divergence is
KL(q || p), which is large where p gives up what q had. Backward, before scale and cap:

    dz[t, v] = w[t] * (p[t, v] - [v = target[t]]) + k[t] * (p[t, v] - q[t, v])
    dhidden[t] = dz[t] . head

It is computed in the forward pass, where the logits are at hand, and scaled in the backward pass.

Shapes   hidden, kl_hidden [T, E], head [V, E]; target, w, k [T]  ->  loss []
Dtypes   hidden, kl_hidden, head one of fp32, bf16, fp16; target int64; w, k, loss and sums fp32
Cost     2 T E V operations, and as many for each of the gradient and the KL; CHUNK rows of logits
         in memory, twice that with the KL (``_head.py``)
Source   Milakov & Gimelshein 2018, arXiv:1805.02867 (the running sum); Hsu et al. 2024,
         arXiv:2410.10989 (the gradient in the forward pass)
Used by  fastsafe.train
"""

from typing import Any

import torch
from torch import Tensor

from ._head import BLOCK, check, logits, through_head
from ._spec import FLOATS, Dims, Kernel, match, runs_reference

_FP32 = (torch.float32,)


def reference(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    kl_hidden: Tensor | None = None,
    kl_weight: Tensor | None = None,
    logits_scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Define the op in plain torch."""
    log_p = logits(hidden, head, logits_scale, softcap).log_softmax(-1)
    losses = -log_p.gather(-1, targets[:, None])[:, 0]
    loss = (losses if weights is None else weights * losses).sum()
    if kl_hidden is None:
        return loss
    log_q = logits(kl_hidden.detach(), head, logits_scale, softcap).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return loss + (kl if kl_weight is None else kl_weight * kl).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        w: Tensor,
        kl_hidden: Tensor | None,
        k: Tensor,
        scale: float,
        cap: float,
    ) -> Tensor:
        y, kl, gradient = through_head(hidden, head, targets, scale, cap, w, kl_hidden, k)
        ctx.save_for_backward(gradient)
        return (k * kl - w * y).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((gradient * grads[0]).to(gradient.dtype), *[None] * 7)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    kl_hidden: Tensor | None = None,
    kl_weight: Tensor | None = None,
    logits_scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Sum of weighted cross-entropies, and of weighted divergences KL(q || p), in nats.

    Each row's part of the gradient has the same bits in any batch, if the library behind
    ``torch.mm`` treats the rows of a product alike.

    Args:
        hidden: [T, E] fp32, bf16 or fp16, contiguous in E.
        head: [V, E] in the same dtype, contiguous in E; gets no gradient.
        targets: [T] int64 in [0, V), also where the weight is 0. The range is not checked: on a
            GPU that would cost a synchronisation.
        weights: [T] fp32, w above; None is 1 everywhere. Gets no gradient.
        kl_hidden: [T, E] like ``hidden``, states of the frozen model that gives q, or None for no
            divergence. Gets no gradient. Every row of it costs a product with the head, so give
            the rows concerned in a call of their own when they are few.
        kl_weight: [T] fp32, k above; None is 1 everywhere. Gets no gradient.
        logits_scale: Logits are divided by it.
        softcap: Bound of the logits, applied after the scale; 0 for none.

    Returns:
        Scalar fp32. Differentiable in ``hidden``, once.

    Raises:
        ValueError: Shapes or devices disagree, a stride is wrong, ``head`` requires a gradient,
            ``kl_weight`` comes without ``kl_hidden``, ``logits_scale`` is not positive or
            ``softcap`` is negative.
        TypeError: A dtype is not listed above.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
        tensor(2.7726)
    """
    op = "linear_cross_entropy"
    check(op, hidden, head, targets, logits_scale, softcap)
    for name, x in (("weights", weights), ("kl_weight", kl_weight)):
        if x is not None:
            match(op, **{"targets": (targets, "T", (torch.int64,)), name: (x, "T", _FP32)})
    if kl_hidden is not None:
        kl = (kl_hidden, "T E", (hidden.dtype,))
        match(op, hidden=(hidden, "T E", FLOATS), kl_hidden=kl)
    elif kl_weight is not None:
        raise ValueError(f"{op}: kl_weight has no kl_hidden to weigh; give both or neither")
    if runs_reference(hidden):
        return reference(
            hidden, head, targets, weights, kl_hidden, kl_weight, logits_scale, softcap
        )
    ones = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
    w, k = ((ones if x is None else x.detach().contiguous()) for x in (weights, kl_weight))
    second = None if kl_hidden is None else kl_hidden.detach()
    targets = targets.contiguous()
    if torch.is_grad_enabled() and hidden.requires_grad:
        loss: Tensor = _LinearCrossEntropy.apply(
            hidden, head, targets, w, second, k, logits_scale, softcap
        )
        return loss
    y, kl_rows, _ = through_head(hidden, head, targets, logits_scale, softcap, None, second)
    return (k * kl_rows - w * y).sum()


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Likely and unlikely targets, some weights 0; the second model is near the first."""
    T, E, V = dims["T"], dims["E"], dims["V"]
    hidden = torch.randn(T, E, device=device, dtype=dtype)
    head = (4 * E**-0.5 * torch.randn(V, E, device=device)).to(dtype)
    targets = torch.randint(V, (T,), device=device)
    weights = torch.arange(T, device=device) % 3 / 2.0 if dims["weighted"] else None
    scale, cap = (2.0, 5.0) if dims["capped"] else (1.0, 0.0)
    if not dims["kl"]:
        return hidden, head, targets, weights, None, None, scale, cap
    near = (hidden + 0.5 * torch.randn(T, E, device=device)).to(dtype)
    k = 0.25 + torch.arange(T, device=device) % 2
    return hidden, head, targets, weights, near, k, scale, cap


KERNEL = Kernel(
    fn=linear_cross_entropy,
    reference=reference,
    make=_make,
    tests=(
        {"T": 1, "E": 16, "V": 3, "weighted": 0, "kl": 0, "capped": 0},
        {"T": 3, "E": 32, "V": 2 * BLOCK + 1, "weighted": 1, "kl": 1, "capped": 0},
        {"T": 7, "E": 64, "V": 997, "weighted": 1, "kl": 1, "capped": 1},
    ),
    bench=(
        {"T": 4096, "E": 4096, "V": 128_256, "weighted": 1, "kl": 0, "capped": 0},
        {"T": 4096, "E": 3584, "V": 256_000, "weighted": 1, "kl": 1, "capped": 1},
    ),
    min_bytes=lambda d, dtype: (d["T"] + d["V"]) * d["E"] * dtype.itemsize,
    flops=lambda d: 2 * d["T"] * d["E"] * d["V"] * (1 + d["kl"]),
    grads=(0,),
)
