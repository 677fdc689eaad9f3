"""Where the kept head of a row's ranking ends, under top-k, top-p and min-p.

Tokens are ranked by logit, equal ones by id, lowest first. With p[v] the softmax of z / T over the
first top_k tokens, a token is dropped when it is not among these, when those before it hold a mass
of top_p already, or when p[v] < min_p * max p. What is kept is always the head of the ranking, and
ends at a logit (``edge``) and, among its ties, at an id (``last``).

Nothing is sorted: the edge is searched by the bits of its rank among all numbers of the dtype, two
bits per pass over the row from the highest down: 16 passes in fp32, 8 in bf16, 10 in fp16.
"""

import torch
from torch import Tensor

from ._triton import tl, triton

BLOCK = 4096
# Trailing bits that are 0 in every logit of a 16-bit dtype read as fp32: the search skips them.
LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}


def keep_head(
    z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Set the logits of dropped tokens to -inf: the definition, in plain torch."""
    ordered, order = z.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(z.shape[1], device=z.device)
    drop = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probs = (ordered / temperature[:, None]).masked_fill(drop, -float("inf")).softmax(-1)
    drop |= (probs.cumsum(-1) - probs >= top_p[:, None]) & (top_p[:, None] < 1)
    drop |= probs < min_p[:, None] * probs[:, :1]
    drop[:, 0] = False
    return z.masked_fill(drop.scatter(-1, order, drop), -float("inf"))


@triton.jit
def _as_float(key, LOW_BITS: tl.constexpr):
    """Logit whose rank among the numbers of z's dtype is ``key``; the lowest bits are unused."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return ((bits >> LOW_BITS) << LOW_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, start, V, BLOCK: tl.constexpr):
    v = start + tl.arange(0, BLOCK)
    return v, tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)


@triton.jit
def _weigh(z, peak, scale):
    """Weight exp2((z - peak) * scale) of a token; 1 with a scale of 0, else 0 at -inf."""
    return tl.exp2(tl.maximum(z - peak, -1e8) * scale)


@triton.jit
def _head(row_ptr, V, peak, scale, norm, target, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Edge and last id of the shortest head whose weight over ``norm`` reaches ``target``.

    Sums only lose terms as the pivot rises, so they fall even when rounded: there is one answer.
    """
    key = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(0, (32 - LOW_BITS) // 2):
        pivot1 = _as_float(key + step, LOW_BITS)
        pivot2 = _as_float(key + 2 * step, LOW_BITS)
        pivot3 = _as_float(key + 3 * step, LOW_BITS)
        sum1 = tl.zeros([BLOCK], tl.float32)
        sum2 = tl.zeros([BLOCK], tl.float32)
        sum3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            v, z = _load(row_ptr, start, V, BLOCK)
            weight = _weigh(z, peak, scale)
            sum1 += tl.where(z >= pivot1, weight, 0.0)
            sum2 += tl.where(z >= pivot2, weight, 0.0)
            sum3 += tl.where(z >= pivot3, weight, 0.0)
        # keys below that of -inf are NaN patterns, at which no sum reaches anything
        digit = tl.where(tl.div_rn(tl.sum(sum1, 0), norm) >= target, step, 0)
        digit = tl.where(tl.div_rn(tl.sum(sum2, 0), norm) >= target, 2 * step, digit)
        key += tl.where(tl.div_rn(tl.sum(sum3, 0), norm) >= target, 3 * step, digit)
        step = step >> 2
    edge = tl.where(key == 0, -float("inf"), _as_float(key, LOW_BITS))
    sum1 = tl.zeros([BLOCK], tl.float32)
    ties = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v, z = _load(row_ptr, start, V, BLOCK)
        sum1 += tl.where(z > edge, _weigh(z, peak, scale), 0.0)
        ties += (z == edge).to(tl.int32)
    above, weight, num_ties = tl.sum(sum1, 0), _weigh(edge, peak, scale), tl.sum(ties, 0)
    spare = 0  # the most ties that leave the target unreached, by its bits
    for i in range(0, 23):
        more = spare + (1 << (22 - i))
        short = tl.div_rn(above + more * weight, norm) < target
        spare = tl.where((more < num_ties) & short, more, spare)
    last = V
    if spare + 1 < num_ties:
        seen = 0
        for start in range(0, V, BLOCK):
            v, z = _load(row_ptr, start, V, BLOCK)
            tie = (z == edge).to(tl.int32)
            is_last = (tie > 0) & (seen + tl.cumsum(tie, 0) == spare + 1)
            last = tl.minimum(last, tl.min(tl.where(is_last, v, V), 0))
            seen += tl.sum(tie, 0)
    return edge, last


@triton.jit
def _ends_kernel(
    z_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, edge_ptr, last_ptr, z_stride, V,
    LOW_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + n * z_stride
    temperature, top_k = tl.load(temperature_ptr + n), tl.load(top_k_ptr + n)
    top_p, min_p = tl.load(top_p_ptr + n), tl.load(min_p_ptr + n)
    counts = (top_k > 0) & (top_k < V)
    edge = -float("inf")
    last = V
    if (temperature > 0) & (counts | (top_p < 1) | (min_p > 0)):
        highest = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            v, z = _load(row_ptr, start, V, BLOCK)
            highest = tl.maximum(highest, z)
        peak = tl.max(highest, 0)
        peak = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
        scale = tl.minimum(1.4426950408889634 / temperature, 1e30)
        if counts:
            edge, last = _head(row_ptr, V, peak, 0.0, 1.0, top_k.to(tl.float32), LOW_BITS, BLOCK)
        if top_p < 1:
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                v, z = _load(row_ptr, start, V, BLOCK)
                kept = (z > edge) | ((z == edge) & (v <= last))
                sums += tl.where(kept, _weigh(z, peak, scale), 0.0)
            mass = tl.maximum(tl.sum(sums, 0), 1.0)  # the first token weighs 1, if there is any
            target = tl.maximum(top_p, 1e-30)  # and stays even at 0
            p_edge, p_last = _head(row_ptr, V, peak, scale, mass, target, LOW_BITS, BLOCK)
            # the shorter head: the higher edge, at equal ones the lower id
            p_last = tl.where(p_edge == edge, tl.minimum(last, p_last), p_last)
            last = tl.where(p_edge >= edge, p_last, last)
            edge = tl.maximum(edge, p_edge)
        if min_p > 0:
            floor = peak + temperature * tl.log(min_p)
            last = tl.where(floor > edge, V, last)
            edge = tl.maximum(edge, floor)
    tl.store(edge_ptr + n, edge)
    tl.store(last_ptr + n, last)


def head_ends(
    z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Edge [N] fp32 and last id [N] int32 of what each row keeps; -inf and V keep all.

    One program per row, so that its passes come from the L2 cache while the rows in flight fit it.
    A row without a filter, or drawn greedily, is not read.
    """
    N, V = z.shape
    edge = torch.empty(N, dtype=torch.float32, device=z.device)
    last = torch.empty(N, dtype=torch.int32, device=z.device)
    _ends_kernel[(N,)](
        z, temperature, top_k, top_p, min_p, edge, last, z.stride(0), V,
        LOW_BITS=LOW_BITS[z.dtype], BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return edge, last
