"""Rows of hidden states through a frozen head, a chunk of logits in memory at a time.

For one row with hidden state x and target t:

    z[v] = x . head[v] / scale,  softcapped: z = cap * tanh(z / cap);    p = softmax z
    y = log p[t],    KL = sum_v q[v] * (log q[v] - log p[v]),  q = softmax of a second row's z

and, for the loss w * -y + k * KL, before scale and cap:

    dz[v] = w * (p[v] - [v = t]) + k * (p[v] - q[v]),    dx = dz . head

The products are torch's. Every chunk has CHUNK rows, the last one padded: cuBLAS picks its
algorithm by shape, and only at one shape does a row get the same bits whatever the number of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._spec import FLOATS, match
from ._triton import tl, triton

# 0.26 GB of logits in bf16 at a vocabulary of 128k, and enough rows to fill the matrix units
CHUNK = 1024
BLOCK = 4096


def logits(hidden: Tensor, head: Tensor, scale: float, cap: float) -> Tensor:
    """Multiply, scale and cap in plain torch: [T, E], [V, E] -> [T, V], fp32 at least."""
    z = F.linear(hidden, head)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) / scale
    return cap * torch.tanh(z / cap) if cap else z


@triton.jit
def _capped(z, inverse_scale, cap, CAPPED: tl.constexpr):
    z = z.to(tl.float32) * inverse_scale
    if CAPPED:
        z = cap * (2 * tl.sigmoid(2 / cap * z) - 1)
    return z


@triton.jit
def _log_sum_exp(row_ptr, V, inverse_scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    m = -float("inf")
    s = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _capped(tl.load(row_ptr + v, mask=v < V, other=0.0), inverse_scale, cap, CAPPED)
        z = tl.where(v < V, z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    return m + tl.log(s)


@triton.jit
def _statistics_kernel(
    z_ptr, q_ptr, t_ptr, y_ptr, lse_ptr, q_lse_ptr, kl_ptr, inverse_scale, cap, V,
    CAPPED: tl.constexpr, HAS_KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + n * V
    chosen = _capped(tl.load(row_ptr + tl.load(t_ptr + n)), inverse_scale, cap, CAPPED)
    lse = _log_sum_exp(row_ptr, V, inverse_scale, cap, CAPPED, BLOCK)
    tl.store(lse_ptr + n, lse)
    tl.store(y_ptr + n, chosen - lse)
    if HAS_KL:
        q_row_ptr = q_ptr + n * V
        q_lse = _log_sum_exp(q_row_ptr, V, inverse_scale, cap, CAPPED, BLOCK)
        kl = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = _capped(tl.load(row_ptr + v, mask=v < V, other=0.0), inverse_scale, cap, CAPPED)
            q = _capped(tl.load(q_row_ptr + v, mask=v < V, other=0.0), inverse_scale, cap, CAPPED)
            log_q = q - q_lse
            kl += tl.where(v < V, tl.exp(log_q) * (log_q - (z - lse)), 0.0)
        tl.store(q_lse_ptr + n, q_lse)
        tl.store(kl_ptr + n, tl.sum(kl, 0))


@triton.jit
def _gradient_kernel(
    z_ptr, q_ptr, t_ptr, lse_ptr, q_lse_ptr, w_ptr, k_ptr, inverse_scale, cap, V,
    CAPPED: tl.constexpr, HAS_KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the gradient of the logits in their place."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = v < V
    at = n * V + v
    z = _capped(tl.load(z_ptr + at, mask=keep, other=0.0), inverse_scale, cap, CAPPED)
    p = tl.exp(z - tl.load(lse_ptr + n))
    hit = (v == tl.load(t_ptr + n)).to(tl.float32)
    dz = tl.load(w_ptr + n) * (p - hit)
    if HAS_KL:
        q = _capped(tl.load(q_ptr + at, mask=keep, other=0.0), inverse_scale, cap, CAPPED)
        dz += tl.load(k_ptr + n) * (p - tl.exp(q - tl.load(q_lse_ptr + n)))
    if CAPPED:
        ratio = z / cap
        dz = dz * (1 - ratio * ratio)
    tl.store(z_ptr + at, (dz * inverse_scale).to(z_ptr.dtype.element_ty), mask=keep)


def check(op: str, hidden: Tensor, head: Tensor, targets: Tensor, scale: float, cap: float) -> None:
    """Refuse arguments that do not fit, for the launchers."""
    match(
        op,
        hidden=(hidden, "T E", FLOATS),
        head=(head, "V E", (hidden.dtype,)),
        targets=(targets, "T", (torch.int64,)),
    )
    for name, x in (("hidden", hidden), ("head", head)):
        if x.stride(1) != 1 and x.shape[1] != 1:
            found = f"stride {x.stride(1)} in E, expected 1"
            raise ValueError(f"{op}: {name} has {found}; call .contiguous()")
    if head.requires_grad:
        raise ValueError(f"{op}: head requires a gradient, expected a frozen one; call .detach()")
    if not scale > 0:
        raise ValueError(f"{op}: logits_scale is {scale}, expected more than 0")
    if not cap >= 0:
        raise ValueError(f"{op}: softcap is {cap}, expected 0 (none) or more")


def through_head(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: float,
    cap: float,
    weights: Tensor | None,
    kl_hidden: Tensor | None = None,
    kl_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, KL and the gradient of the loss, chunk by chunk.

    Args:
        hidden: [T, E].
        head: [V, E].
        targets: [T] int64.
        scale: Divides the logits.
        cap: Of the logits, 0 for none.
        weights: [T] fp32, w above; None computes no gradient.
        kl_hidden: [T, E] of the second row, or None.
        kl_weight: [T] fp32, k above; unused without a gradient.

    Returns:
        y [T] fp32; KL [T] fp32, zero without ``kl_hidden``; d loss / d hidden [T, E], empty
        without ``weights``.
    """
    T, V = len(hidden), len(head)
    inverse, cap = 1 / scale, float(cap)
    y = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, q_lse, kl = torch.empty_like(y), torch.empty_like(y), torch.zeros_like(y)
    gradient = torch.empty_like(hidden) if weights is not None else hidden.new_empty(0)
    z = hidden.new_empty(CHUNK, V)
    q = torch.empty_like(z) if kl_hidden is not None else z
    options = {"CAPPED": cap != 0, "HAS_KL": kl_hidden is not None, "BLOCK": BLOCK, "num_warps": 8}
    for start in range(0, T, CHUNK):
        rows = slice(start, min(start + CHUNK, T))
        count = rows.stop - start
        pad = (0, 0, 0, CHUNK - count)
        torch.mm(F.pad(hidden[rows], pad), head.T, out=z)
        if kl_hidden is not None:
            torch.mm(F.pad(kl_hidden[rows], pad), head.T, out=q)
        t, stats = targets[rows], (lse[rows], q_lse[rows])
        _statistics_kernel[(count,)](z, q, t, y[rows], *stats, kl[rows], inverse, cap, V, **options)
        if weights is not None:
            k = weights if kl_weight is None else kl_weight
            _gradient_kernel[(count, triton.cdiv(V, BLOCK))](
                z, q, t, *stats, weights[rows], k[rows], inverse, cap, V, **options
            )
            gradient[rows] = torch.mm(z, head)[:count]
    return y, kl, gradient
