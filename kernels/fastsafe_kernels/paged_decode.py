"""Attention of one new token per row over keys and values held in pages.

    s[n, h, t]  = scale * q[n, h] . k[n, h // G, t],   softcap * tanh(s / softcap) where capped
    lse[n, h]   = log sum_t exp s[n, h, t],            max(0, C[n] - window) <= t < C[n]
    y[n, h]     = sum_t exp(s[n, h, t] - lse[n, h]) v[n, h // G, t]

    k[n, :, t]  = k_pages[block_table[n, t // S], :, t % S], and v alike;  G = H / Hkv

C[n] counts the context with the new token in it. Rows with C = 0 are idle: y = 0, lse = -inf.

Shapes   q [N, H, D], k_pages and v_pages [P, Hkv, S, D], block_table [N, B], C [N]
         ->  y [N, H, D], lse [N, H]
Dtypes   q, k, v, y alike: fp32, bf16 or fp16; block_table and C int32 or int64; lse, sums fp32
Cost     every visible key and value is read once; above 512 tokens of context per row another
         4 * H * D bytes are written and read for each 512 tokens
Source   Dao et al. 2023, flash-decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html), with
         splits of a fixed size; Kwon et al. 2023, arXiv:2309.06180 (their blocks are our pages)
Used by  fastsafe.engine (decode), with prefix_attention and merge_attention for judges
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# Tokens that one program sums over. Constant: the order of a row's sum depends on its own context
# alone, not on the batch or on the width of the table.
SPLIT = 512
# Bytes of one tile of keys: 64 tokens of 128 numbers in 16 bits. Two tiles of keys and of values
# are on their way while a third is used; three such programs fit one multiprocessor.
TILE_BYTES = 16 * 1024


def reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch; sums in the dtype of ``q``, statistics at least in fp32."""
    (N, H, D), (_, Hkv, S, _) = q.shape, k_pages.shape
    tokens = torch.arange(block_table.shape[1] * S, device=q.device)
    hidden = tokens >= context_lens[:, None]
    if window:
        hidden |= tokens < context_lens[:, None] - window
    # what no visible token needs may hold anything, in the table and in the pages
    unused = hidden.view(*block_table.shape, S).all(-1)
    pages = block_table.masked_fill(unused, 0)
    k, v = (
        x[pages].transpose(1, 2).flatten(2, 3).masked_fill(hidden[:, None, :, None], 0)
        for x in (k_pages, v_pages)
    )
    scores = q.reshape(N, Hkv, H // Hkv, D) @ k.transpose(2, 3)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)).to(v.dtype)
    return (weights @ v).reshape(N, H, D), lse.reshape(N, H)


@triton.jit
def _visible(context_ptr, n, window, WINDOW: tl.constexpr):
    """First and one past the last token that row ``n`` sees."""
    end = tl.load(context_ptr + n).to(tl.int32)
    begin = tl.maximum(end - window, 0) if WINDOW else 0 * end
    return begin, end


@triton.jit(do_not_specialize=["table_stride", "window"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    context_ptr,
    y_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_stride_n,
    q_stride_h,
    k_stride_p,
    k_stride_h,
    v_stride_p,
    v_stride_h,
    table_stride,
    window,
    scale,
    softcap,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # heads of one row side by side: they lie side by side in a page
    n = (tl.program_id(0) // HKV).to(tl.int64)
    kv_head = tl.program_id(0) % HKV
    begin, end = _visible(context_ptr, n, window, WINDOW)
    first = begin // SPLIT
    split = first + tl.program_id(1)
    lo = tl.maximum(begin, split * SPLIT)
    hi = tl.minimum(end, split * SPLIT + SPLIT)
    # an idle row has an empty first split, which writes its zeros
    if (lo >= hi) & (tl.program_id(1) > 0):
        return

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    keep_q = (g < GROUP)[:, None] & (d < D)[None, :]
    at_q = n * q_stride_n + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + at_q, mask=keep_q, other=0.0)
    at = t[:, None] * D + d[None, :]
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h + at
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h + at
    m = tl.full([BLOCK_G], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    # All pages of the split at once: a load within the loop would take stages of its pipeline from
    # the keys and values that wait for it.
    PAGES: tl.constexpr = (SPLIT + S - 1) // S
    nearby = split * SPLIT // S + tl.arange(0, PAGES)
    pages = tl.load(table_ptr + n * table_stride + nearby, mask=nearby * S < hi, other=0)
    for start in tl.range(lo // BLOCK_N * BLOCK_N, hi, BLOCK_N):
        page = tl.sum(tl.where(nearby == start // S, pages, 0).to(tl.int64), 0)
        inside = start % S * D
        keep = (start + t >= lo) & (start + t < hi)
        keep_kv = keep[:, None] & (d < D)[None, :]
        k = tl.load(k_head_ptr + (page * k_stride_p + inside), mask=keep_kv, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            # tanh(x) = 2 sigmoid(2 x) - 1
            z = softcap * (2 * tl.sigmoid(z * (2 * scale / softcap)) - 1) * 1.4426950408889634
        else:
            z = z * (scale * 1.4426950408889634)
        # exponents of 2 from here on; the first block holds a visible key, so m_new is finite
        z = tl.where(keep[None, :], z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp2(z - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        s = s * shrink + tl.sum(p, 1)
        v = tl.load(v_head_ptr + (page * v_stride_p + inside), mask=keep_kv, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    s = tl.where(s == 0, 1.0, s)
    acc = acc / s[:, None]
    lse = m + tl.log2(s)

    row = n * HKV * GROUP + head
    if end <= (first + 1) * SPLIT:
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * D + d[None, :], y, mask=keep_q)
        tl.store(lse_ptr + row, lse * 0.6931471805599453, mask=g < GROUP)
    else:
        part = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=keep_q)
        tl.store(part_lse_ptr + part, lse, mask=g < GROUP)


@triton.jit(do_not_specialize=["num_parts", "window"])
def _merge_kernel(
    part_ptr,
    part_lse_ptr,
    context_ptr,
    y_ptr,
    lse_ptr,
    num_parts,
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = _visible(context_ptr, row // H, window, WINDOW)
    first = begin // SPLIT
    if end <= (first + 1) * SPLIT:
        return
    d = tl.arange(0, BLOCK_D)
    m = -float("inf")
    s = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, (end + SPLIT - 1) // SPLIT - first):
        part = row * num_parts + i
        lse = tl.load(part_lse_ptr + part)
        m_new = tl.maximum(m, lse)
        shrink = tl.exp2(m - m_new)
        weight = tl.exp2(lse - m_new)
        s = s * shrink + weight
        acc = acc * shrink + weight * tl.load(part_ptr + part * D + d, mask=d < D, other=0.0)
        m = m_new
    tl.store(y_ptr + row * D + d, (acc / s).to(y_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + row, (m + tl.log2(s)) * 0.6931471805599453)


def _launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    (N, H, D), (_, Hkv, S, _) = q.shape, k_pages.shape
    y = torch.empty((N, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((N, H), dtype=torch.float32, device=q.device)
    if N == 0:
        return y, lse
    parts = max(1, triton.cdiv(block_table.shape[1] * S, SPLIT))
    if window:
        parts = min(parts, triton.cdiv(window - 1, SPLIT) + 1)
    # a row that fits one split is written at once
    held = parts if parts > 1 else 0
    part = torch.empty((N, H, held, D), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((N, H, held), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(D))
    _split_kernel[(N * Hkv, parts)](
        q, k_pages, v_pages, block_table, context_lens, y, lse, part, part_lse,
        q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), v_pages.stride(0),
        v_pages.stride(1), block_table.stride(0), window, float(scale), float(softcap),
        HKV=Hkv, GROUP=H // Hkv, D=D, S=S, SPLIT=SPLIT,
        # tensor cores take 16 rows at least
        BLOCK_G=max(16, triton.next_power_of_2(H // Hkv)),
        BLOCK_N=min(S, SPLIT, TILE_BYTES // (block_d * q.element_size())),
        BLOCK_D=block_d, WINDOW=window > 0, SOFTCAP=softcap > 0,
        # without tensor cores four warps would run out of registers
        num_warps=4 if q.element_size() == 2 else 8, num_stages=3,
    )  # fmt: skip
    if held:
        _merge_kernel[(N * H,)](
            part, part_lse, context_lens, y, lse, parts, window,
            H=H, D=D, SPLIT=SPLIT, BLOCK_D=block_d, WINDOW=window > 0, num_warps=1,
        )  # fmt: skip
    return y, lse


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row and head over the row's pages.

    On a GPU a row's bits depend on its own query, context, keys and values alone: not on other
    rows, on the pages that hold it or on the width of the table. Time does depend on the width: a
    program per 512 tokens of it starts and, where a row is shorter, stops at once.

    Args:
        q: [N, H, D] fp32, bf16 or fp16, contiguous in D; D at most 256. Head h looks at
            key/value head h // (H / Hkv).
        k_pages: [P, Hkv, S, D] like ``q``, each [S, D] contiguous; S a power of two, at least 16.
            What lies outside of a row's visible context is not read.
        v_pages: As ``k_pages``.
        block_table: [N, B] int32 or int64: page of tokens [b * S, (b + 1) * S) of each row.
            Entries without a visible token may hold anything; the others are not checked: on a
            GPU that would cost a synchronisation.
        context_lens: [N] int32 or int64 in [0, B * S], not checked either; the new token counts,
            its key and value are in the pages already. 0 = idle row.
        scale: Multiplies q . k.
        window: Number of keys that a query sees, itself included; 0 = all.
        softcap: Bound of the scaled scores; 0 = none.

    Returns:
        y [N, H, D] like ``q``, zeros for idle rows, and the log-sum-exp of the scores [N, H] in
        fp32 and nats, -inf for idle rows: ``merge_attention`` takes both. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, a stride or a size is not supported.
        TypeError: A dtype is not listed above.

    Example:
        >>> q, pages = torch.ones(1, 2, 4), torch.ones(3, 1, 16, 4)
        >>> table, context = torch.tensor([[2, 0]]), torch.tensor([20])
        >>> y, lse = paged_decode(q, pages, pages, table, context, scale=0.5)
        >>> y.shape, lse
        (torch.Size([1, 2, 4]), tensor([[4.9957, 4.9957]]))
    """
    ints = (torch.int32, torch.int64)
    size = match(
        "paged_decode",
        q=(q, "N H D", FLOATS),
        k_pages=(k_pages, "P Hkv S D", (q.dtype,)),
        v_pages=(v_pages, "P Hkv S D", (q.dtype,)),
        block_table=(block_table, "N B", ints),
        context_lens=(context_lens, "N", ints),
    )
    H, Hkv, S, D = (size[name] for name in ("H", "Hkv", "S", "D"))
    if H % Hkv:
        raise ValueError(f"paged_decode: q has {H} heads, expected a multiple of Hkv={Hkv}")
    if S < 16 or S & (S - 1):
        raise ValueError(f"paged_decode: k_pages has S={S}, expected a power of two from 16 on")
    if D > 256:
        raise ValueError(f"paged_decode: q has D={D}, expected at most 256")
    if window < 0 or softcap < 0:
        got = f"window={window} and softcap={softcap}"
        raise ValueError(f"paged_decode: {got}, expected no negative number; 0 = none")
    if q.stride(2) != 1:
        stride = f"stride {q.stride(2)} in D, expected 1"
        raise ValueError(f"paged_decode: q has {stride}; call .contiguous()")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.stride()[2:] != (D, 1):
            stride = f"strides {list(pages.stride()[2:])} in S and D, expected {[D, 1]}"
            raise ValueError(f"paged_decode: {name} has {stride}; call .contiguous()")
    for name, x in (("block_table", block_table), ("context_lens", context_lens)):
        if x.stride(-1) != 1 and x.numel() > 1:
            stride = f"stride {x.stride(-1)} in its last dimension, expected 1"
            raise ValueError(f"paged_decode: {name} has {stride}; call .contiguous()")
    if runs_reference(q):
        y, lse = reference(q, k_pages, v_pages, block_table, context_lens, scale, window, softcap)
        return y, lse.to(torch.float32)
    return _launch(q, k_pages, v_pages, block_table, context_lens, scale, window, softcap)


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Scores rise along the context so that the running maximum moves; pages lie in any order."""
    N, H, Hkv, D, S, T = (dims[name] for name in ("N", "H", "Hkv", "D", "S", "T"))
    B = triton.cdiv(T, S) + 1
    window, softcap = dims.get("window", 0), float(dims.get("softcap", 0))
    # the first row has T tokens, the next ones 7 fewer each, down to idle ones
    context = (T - 7 * torch.arange(N, device=device)).clamp(min=0)
    if "ragged" not in dims:
        context = torch.full_like(context, T)
    tokens = torch.arange(B * S, device=device)
    hidden = (tokens >= context[:, None]).view(N, B, 1, S, 1)
    q = torch.randn(N, H, D, dtype=dtype, device=device)
    k, v = torch.randn(2, N, B, Hkv, S, D, dtype=dtype, device=device)
    k = k + (q.view(N, 1, Hkv, -1, D).mean(3) * 2)[:, :, :, None] * tokens.view(B, 1, S, 1) / T
    k, v = (x.to(dtype).masked_fill(hidden, torch.nan).flatten(0, 1) for x in (k, v))
    order = torch.randperm(N * B, device=device)
    table = torch.argsort(order).view(N, B).to(torch.int32)
    return q, k[order], v[order], table, context.to(torch.int32), D**-0.5, window, softcap


KERNEL = Kernel(
    fn=paged_decode,
    reference=reference,
    make=_make,
    tests=(
        {"N": 1, "H": 1, "Hkv": 1, "D": 16, "S": 16, "T": 1},
        {"N": 7, "H": 6, "Hkv": 2, "D": 24, "S": 16, "T": 37, "ragged": 1, "softcap": 3},
        {"N": 2, "H": 2, "Hkv": 1, "D": 40, "S": 256, "T": 2 * SPLIT + 1, "ragged": 1},
        {"N": 3, "H": 2, "Hkv": 2, "D": 32, "S": 64, "T": 601, "ragged": 1, "window": 101},
    ),
    bench=(
        {"N": 1024, "H": 32, "Hkv": 8, "D": 128, "S": 64, "T": 300},
        {"N": 64, "H": 32, "Hkv": 8, "D": 128, "S": 64, "T": 4000},
        {"N": 256, "H": 16, "Hkv": 8, "D": 256, "S": 64, "T": 1000, "window": 512, "softcap": 50},
    ),
    min_bytes=lambda d, dtype: (
        2 * d["N"] * min(d["T"], d.get("window", d["T"])) * d["Hkv"] * d["D"] * dtype.itemsize
    ),
    flops=lambda d: 4 * d["N"] * min(d["T"], d.get("window", d["T"])) * d["H"] * d["D"],
)
