"""Attention of many rows over one prefix that all of them share.

    s[n, h, l]  = scale * q[n, h] . k[l, h // G],   softcap * tanh(s / softcap) where capped
    lse[n, h]   = log sum_l exp s[n, h, l]
    y[n, h]     = sum_l exp(s[n, h, l] - lse[n, h]) v[l, h // G],   G = H / Hkv

Every row sees the whole prefix, so rows and the heads of a group are rows of one matrix per
key/value head, and the prefix is read once per tile of them instead of once per row.

Shapes   q [N, H, D], k and v [L, Hkv, D]  ->  y [N, H, D], lse [N, H]
Dtypes   q, k, v, y alike: fp32, bf16 or fp16; lse and every sum fp32
Cost     4 * N * H * L * D floating-point operations; q is read and y written once
Source   Juravsky et al. 2024, arXiv:2402.05099 (Hydragen); Milakov & Gimelshein 2018,
         arXiv:1805.02867 (the running maximum and sum)
Used by  fastsafe.engine (judges with a shared rubric), with paged_decode and merge_attention
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton


class _Tile(NamedTuple):
    """Rows and prefix tokens of one program's step, and how it is compiled."""

    M: int
    N: int
    num_warps: int
    num_stages: int


def _tile(block_d: int, element_size: int) -> _Tile:
    """Choose by head size and dtype alone, so that a row's bits do not depend on the batch."""
    if element_size == 4:  # no tensor cores: small tiles, or registers run out
        return _Tile(32 if block_d < 256 else 16, 16, 8, 2)
    if block_d < 256:
        return _Tile(128, 64, 8, 3)
    return _Tile(64, 64, 8, 2)


def reference(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch; sums in the dtype of ``q``, statistics at least in fp32."""
    (N, H, D), Hkv = q.shape, k_prefix.shape[1]
    # [N, H, D] -> [Hkv, N * G, D]
    grouped = q.reshape(N, Hkv, H // Hkv, D).transpose(0, 1).flatten(1, 2)
    scores = grouped @ k_prefix.permute(1, 2, 0)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[:, :, None]).to(v_prefix.dtype)
    y = weights @ v_prefix.transpose(0, 1)
    y = y.view(Hkv, N, H // Hkv, D).transpose(0, 1)
    return y.reshape(N, H, D), lse.view(Hkv, N, H // Hkv).transpose(0, 1).reshape(N, H)


@triton.jit(do_not_specialize=["rows", "L"])
def _prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    lse_ptr,
    q_stride_n,
    q_stride_h,
    k_stride_l,
    k_stride_h,
    v_stride_l,
    v_stride_h,
    rows,
    L,
    scale,
    softcap,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # programs that run side by side share a key/value head, so that its prefix stays in L2
    kv_head = tl.program_id(1)
    # offsets from the tile's first row fit 32 bits, and so take half of the registers
    first = tl.program_id(0) * BLOCK_M
    n = (first // GROUP).to(tl.int64)
    i = first % GROUP + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_N)
    keep = first + tl.arange(0, BLOCK_M) < rows
    keep_d = (d < D)[None, :]
    at_q = (i // GROUP * q_stride_n + i % GROUP * q_stride_h)[:, None] + d[None, :]
    q_tile_ptr = q_ptr + n * q_stride_n + kv_head * GROUP * q_stride_h
    q = tl.load(q_tile_ptr + at_q, mask=keep[:, None] & keep_d, other=0.0)
    at_k = t[:, None] * k_stride_l + d[None, :]
    at_v = t[:, None] * v_stride_l + d[None, :]
    k_block_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h
    v_block_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, L, BLOCK_N):
        visible = start + t < L
        keep_kv = visible[:, None] & keep_d
        k = tl.load(k_block_ptr + at_k, mask=keep_kv, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        # exponents of 2 from here on: log2(e) = 1.4426950408889634
        if SOFTCAP:
            # tanh(x) = 2 sigmoid(2 x) - 1
            z = softcap * (2 * tl.sigmoid(z * (2 * scale / softcap)) - 1) * 1.4426950408889634
        else:
            z = z * (scale * 1.4426950408889634)
        # a sum, unlike a choice, is one instruction with the product before it
        z += tl.where(visible, 0.0, -float("inf"))[None, :]
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp2(z - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        s = s * shrink + tl.sum(p, 1)
        v = tl.load(v_block_ptr + at_v, mask=keep_kv, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new
        k_block_ptr += BLOCK_N * k_stride_l
        v_block_ptr += BLOCK_N * v_stride_l
    row = (n * HKV + kv_head) * GROUP
    at = i // GROUP * HKV * GROUP + i % GROUP
    y = (acc / s[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + (at[:, None] * D + d[None, :]), y, mask=keep[:, None] & keep_d)
    tl.store(lse_ptr + row + at, (m + tl.log2(s)) * 0.6931471805599453, mask=keep)


def _launch(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    (N, H, D), (L, Hkv, _) = q.shape, k_prefix.shape
    y = torch.empty((N, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((N, H), dtype=torch.float32, device=q.device)
    if L == 0:
        return y.zero_(), lse.fill_(-torch.inf)
    if N:
        rows = N * (H // Hkv)
        block_d = max(16, triton.next_power_of_2(D))
        tile = _tile(block_d, q.element_size())
        _prefix_kernel[(triton.cdiv(rows, tile.M), Hkv)](
            q,
            k_prefix,
            v_prefix,
            y,
            lse,
            *q.stride()[:2],
            *k_prefix.stride()[:2],
            *v_prefix.stride()[:2],
            rows,
            L,
            float(scale),
            float(softcap),
            HKV=Hkv,
            GROUP=H // Hkv,
            D=D,
            BLOCK_M=tile.M,
            BLOCK_N=tile.N,
            BLOCK_D=block_d,
            SOFTCAP=softcap > 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y, lse


def prefix_attention(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention of every row over the whole of one shared prefix.

    With ``paged_decode`` over each row's own tokens and ``merge_attention`` of both parts this is
    attention over prefix and tokens. On a GPU a row's bits depend on its own query and the prefix
    alone, not on other rows, their number or their order.

    Args:
        q: [N, H, D] fp32, bf16 or fp16, contiguous in D; D at most 256. Head h looks at
            key/value head h // (H / Hkv).
        k_prefix: [L, Hkv, D] like ``q``, contiguous in D.
        v_prefix: As ``k_prefix``.
        scale: Multiplies q . k.
        softcap: Bound of the scaled scores; 0 = none.

    Returns:
        y [N, H, D] like ``q``, zeros at L = 0, and the log-sum-exp of the scores [N, H] in fp32
        and nats, -inf at L = 0. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, a stride or a size is not supported.
        TypeError: A dtype is not listed above.

    Example:
        >>> q, k = torch.zeros(1, 2, 4), torch.ones(20, 1, 4)
        >>> y, lse = prefix_attention(q, k, 3 * k, scale=0.5)
        >>> y.shape, lse
        (torch.Size([1, 2, 4]), tensor([[2.9957, 2.9957]]))
    """
    size = match(
        "prefix_attention",
        q=(q, "N H D", FLOATS),
        k_prefix=(k_prefix, "L Hkv D", (q.dtype,)),
        v_prefix=(v_prefix, "L Hkv D", (q.dtype,)),
    )
    H, Hkv, D = size["H"], size["Hkv"], size["D"]
    if H % Hkv:
        raise ValueError(f"prefix_attention: q has {H} heads, expected a multiple of Hkv={Hkv}")
    if D > 256:
        raise ValueError(f"prefix_attention: q has D={D}, expected at most 256")
    if softcap < 0:
        raise ValueError(f"prefix_attention: softcap is {softcap}, expected 0 (none) or more")
    for name, x in (("q", q), ("k_prefix", k_prefix), ("v_prefix", v_prefix)):
        if x.stride(2) != 1:
            stride = f"stride {x.stride(2)} in D, expected 1"
            raise ValueError(f"prefix_attention: {name} has {stride}; call .contiguous()")
    if runs_reference(q):
        y, lse = reference(q, k_prefix, v_prefix, scale, softcap)
        return y, lse.to(torch.float32)
    return _launch(q, k_prefix, v_prefix, scale, softcap)


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Scores rise along the prefix so that the running maximum moves."""
    N, H, Hkv, D, L = (dims[name] for name in ("N", "H", "Hkv", "D", "L"))
    q = torch.randn(N, H, D, device=device) + 1
    k, v = torch.randn(2, L, Hkv, D, device=device)
    k = k + torch.linspace(0, 2, L, device=device)[:, None, None]
    return q.to(dtype), k.to(dtype), v.to(dtype), D**-0.5, float(dims.get("softcap", 0))


KERNEL = Kernel(
    fn=prefix_attention,
    reference=reference,
    make=_make,
    tests=(
        {"N": 1, "H": 1, "Hkv": 1, "D": 16, "L": 1},
        {"N": 3, "H": 6, "Hkv": 2, "D": 24, "L": 67, "softcap": 3},
        {"N": 67, "H": 2, "Hkv": 1, "D": 16, "L": 128},
        {"N": 43, "H": 3, "Hkv": 1, "D": 64, "L": 129},
    ),
    bench=(
        {"N": 1024, "H": 32, "Hkv": 8, "D": 128, "L": 1500},
        {"N": 1024, "H": 16, "Hkv": 8, "D": 256, "L": 1500, "softcap": 50},
    ),
    min_bytes=lambda d, dtype: (
        2 * (d["N"] * d["H"] + d["L"] * d["Hkv"]) * d["D"] * dtype.itemsize + 4 * d["N"] * d["H"]
    ),
    flops=lambda d: 4 * d["N"] * d["H"] * d["L"] * d["D"],
    wgmma=("_prefix_kernel",),
)
