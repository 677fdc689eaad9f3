"""AdamW of many flat adapters at once, each with its own clip, learning rate and step.

    norm[a] = |grad[a]|_2
    g = grad[a] * min(1, clip[a] / (norm[a] + 1e-6)),    clip[a] = 0: g = grad[a]
    p = p * (1 - rate[a] * decay[a])
    m = m + (1 - b1) * (g - m),      v = b2 * v + (1 - b2) * g^2
    p = p - rate[a] / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps),      t = step[a]

over the first length[a] values of row a. Nothing of a row with step 0 is read or written, and its
norm is 0. The arithmetic is that of ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW``.

Shapes   param, grad, m, v [A, P]; rate, step, length, decay, clip [A]  ->  norm [A]
Dtypes   fp32, rate, decay and clip also fp64; step int64 or fp32; length int64; t's powers fp64
Cost     reads grad twice and the rest once, writes p, m, v: 32 bytes per parameter
Source   Loshchilov & Hutter 2019, arXiv:1711.05101
Used by  fastsafe.train
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._spec import Dims, Kernel, match, runs_reference
from ._triton import tl, triton

BLOCK = 2048
SEGMENT = 32 * BLOCK  # values whose squares one program sums
PARTIALS = 1024  # of these sums, added in step
_RATES = (torch.float32, torch.float64)


def _per_row(x: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor [A] as a tensor [A]."""
    if isinstance(x, Tensor):
        return x
    return torch.full(like.shape, x, dtype=torch.float64, device=like.device)


def reference(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    learning_rate: Tensor,
    step: Tensor,
    lengths: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Tensor | float = 0.0,
    max_grad_norm: Tensor | float = 0.0,
) -> Tensor:
    """Define the op in plain torch, row by row."""
    norms = torch.zeros(len(params), dtype=params.dtype, device=params.device)
    decays, clips = (_per_row(x, learning_rate).tolist() for x in (weight_decay, max_grad_norm))
    rows = zip(learning_rate.tolist(), step.tolist(), lengths.tolist(), strict=True)
    for a, (rate, t, length) in enumerate(rows):
        if not t:
            continue
        p, g, mean, square = (x[a, :length] for x in (params, grads, m, v))
        norms[a] = torch.linalg.vector_norm(g)
        if clips[a] > 0:
            g = g * (clips[a] / (norms[a] + 1e-6)).clamp(max=1.0)
        p.mul_(1 - rate * decays[a])
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        p.addcdiv_(mean, denominator, value=-rate / (1 - beta1**t))
    return norms


@triton.jit
def _square_kernel(
    g_ptr, step_ptr, length_ptr, partial_ptr, P, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    a = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SEGMENT
    length = tl.load(length_ptr + a)
    if (tl.load(step_ptr + a) != 0) & (first < length):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(first, tl.minimum(first + SEGMENT, length), BLOCK):
            i = start + tl.arange(0, BLOCK)
            g = tl.load(g_ptr + a * P + i, mask=i < length, other=0.0)
            total += g * g
        tl.store(partial_ptr + a * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _row_kernel(
    partial_ptr, step_ptr, length_ptr, rate_ptr, decay_ptr, clip_ptr, norm_ptr, factor_ptr,
    log_beta1, log_beta2, segments, SEGMENT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Norm of a row, and the four numbers of its update."""
    a = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr + a)
    used = tl.where(step == 0, 0, tl.cdiv(tl.load(length_ptr + a), SEGMENT))
    total = tl.zeros([PARTIALS], tl.float32)
    # by a constant: the order of the sum does not depend on how wide the buffer is
    for start in range(0, used, PARTIALS):
        i = start + tl.arange(0, PARTIALS)
        total += tl.load(partial_ptr + a * segments + i, mask=i < used, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    clip = tl.load(clip_ptr + a).to(tl.float32)
    factor = tl.minimum(clip / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    rate = tl.load(rate_ptr + a).to(tl.float64)
    # fp64: 1 - 0.999^t loses four digits in fp32
    t = tl.where(step == 0, 1, step).to(tl.float64)
    correction1 = 1 - tl.exp(t * log_beta1)
    correction2 = 1 - tl.exp(t * log_beta2)
    tl.store(norm_ptr + a, norm)
    row_ptr = factor_ptr + 4 * a
    tl.store(row_ptr, tl.where(clip > 0, factor, 1.0))
    tl.store(row_ptr + 1, (1 - rate * tl.load(decay_ptr + a)).to(tl.float32))
    tl.store(row_ptr + 2, (rate / correction1).to(tl.float32))
    tl.store(row_ptr + 3, tl.sqrt(correction2).to(tl.float32))


@triton.jit
def _update_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, step_ptr, length_ptr, factor_ptr, P, rest1, beta2, rest2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    length = tl.load(length_ptr + a)
    if (tl.load(step_ptr + a) != 0) & (first < length):
        i = first + tl.arange(0, BLOCK)
        keep = i < length
        at = a * P + i
        row_ptr = factor_ptr + 4 * a
        g = tl.load(g_ptr + at, mask=keep, other=0.0) * tl.load(row_ptr)
        m = tl.load(m_ptr + at, mask=keep, other=0.0)
        v = tl.load(v_ptr + at, mask=keep, other=0.0)
        p = tl.load(p_ptr + at, mask=keep, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        denominator = tl.sqrt_rn(v) / tl.load(row_ptr + 3) + eps
        p = p * tl.load(row_ptr + 1) - tl.load(row_ptr + 2) * (m / denominator)
        tl.store(m_ptr + at, m, mask=keep)
        tl.store(v_ptr + at, v, mask=keep)
        tl.store(p_ptr + at, p, mask=keep)


def adamw(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    learning_rate: Tensor,
    step: Tensor,
    lengths: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Tensor | float = 0.0,
    max_grad_norm: Tensor | float = 0.0,
) -> Tensor:
    """Take one step of every adapter: clip its gradient, then update it, in place.

    An adapter's result has the same bits whatever the others are, and however many.

    Args:
        params: [A, P] fp32, contiguous; written.
        grads: [A, P] fp32, contiguous. Not modified.
        m: [A, P] fp32, contiguous, running mean of gradients; written.
        v: [A, P] fp32, contiguous, running mean of their squares; written.
        learning_rate: [A] fp32 or fp64.
        step: [A] int64 or fp32, the number of this step, from 1; 0 leaves the adapter alone.
        lengths: [A] int64 in [0, P], values of each row that are in use. Not checked.
        beta1: Decay of ``m``, in (0, 1).
        beta2: Decay of ``v``, in (0, 1).
        eps: Added to the denominator.
        weight_decay: Number, or [A] fp32 or fp64.
        max_grad_norm: Number, or [A] fp32 or fp64; 0 means no clipping.

    Returns:
        [A] fp32, norms of the gradients before clipping; 0 where the step is 0. A norm that is
        not finite has spoiled its adapter, and no other.

    Raises:
        ValueError: Shapes or devices disagree, a buffer is not contiguous, or a beta is not in
            (0, 1).
        TypeError: A dtype is not listed above.

    Example:
        >>> p, g = torch.ones(1, 2), torch.tensor([[3.0, 4.0]])
        >>> m, v, one = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1])
        >>> adamw(p, g, m, v, torch.tensor([0.1]), one, torch.tensor([2])), p
        (tensor([5.]), tensor([[0.9000, 0.9000]]))
    """
    decays, clips = (_per_row(x, learning_rate) for x in (weight_decay, max_grad_norm))
    buffers = {"params": params, "grads": grads, "m": m, "v": v}
    size = match(
        "adamw",
        **{name: (x, "A P", (torch.float32,)) for name, x in buffers.items()},
        learning_rate=(learning_rate, "A", _RATES),
        step=(step, "A", (torch.int64, torch.float32)),
        lengths=(lengths, "A", (torch.int64,)),
        weight_decay=(decays, "A", _RATES),
        max_grad_norm=(clips, "A", _RATES),
    )
    A, P = size["A"], size["P"]
    for name, x in buffers.items():
        if not x.is_contiguous():
            found = f"strides {list(x.stride())}, expected {[P, 1]}"
            raise ValueError(f"adamw: {name} has {found}; allocate it contiguous")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"adamw: beta1 is {beta1} and beta2 is {beta2}, expected both in (0, 1)")
    if runs_reference(params):
        return reference(
            params, grads, m, v, learning_rate, step, lengths, beta1, beta2, eps, decays, clips
        )
    norms = torch.zeros(A, dtype=torch.float32, device=params.device)
    if A and P:
        rows = (step, lengths, learning_rate, decays, clips)
        step, lengths, learning_rate, decays, clips = (x.contiguous() for x in rows)
        segments = triton.cdiv(P, SEGMENT)
        partials, factors = norms.new_empty(A, segments), norms.new_empty(A, 4)
        _square_kernel[(segments, A)](
            grads, step, lengths, partials, P, SEGMENT=SEGMENT, BLOCK=BLOCK
        )
        _row_kernel[(A,)](
            partials, step, lengths, learning_rate, decays, clips, norms, factors,
            math.log(beta1), math.log(beta2), segments, SEGMENT=SEGMENT, PARTIALS=PARTIALS,
        )  # fmt: skip
        _update_kernel[(triton.cdiv(P, BLOCK), A)](
            params, grads, m, v, step, lengths, factors, P, 1 - beta1, beta2, 1 - beta2, eps,
            BLOCK=BLOCK,
        )  # fmt: skip
    return norms


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Adapters of different lengths, rates, steps and norms; the last one stands still."""
    A, P = dims["A"], dims["P"]
    a = torch.arange(A, device=device)
    size = 10.0 ** (a % 3 - 1)[:, None]
    p, g, m, v = torch.randn(4, A, P, device=device)
    step = torch.where((a == A - 1) & (a > 0), 0, 1 + 7 * a * a)
    lengths = P - a * P // (2 * A)
    clip = torch.where(a % 2 == 0, 1.0, 0.0)
    rate, decay = 1e-2 / (1.0 + a), 0.1 * (a % 2)
    g, m, v = g * size, 0.1 * m * size, v.square() * size * size
    return p, g, m, v, rate, step, lengths, 0.9, 0.999, 1e-8, decay, clip


KERNEL = Kernel(
    fn=adamw,
    reference=reference,
    make=_make,
    tests=(
        {"A": 1, "P": 1},
        {"A": 5, "P": 997},
        {"A": 3, "P": 2 * SEGMENT + 1},
    ),
    bench=({"A": 1, "P": 41_943_040}, {"A": 16, "P": 41_943_040}),
    min_bytes=lambda d, dtype: d["A"] * d["P"] * 32,
    dtypes=(torch.float32,),
    mutates=(0, 2, 3),
)
