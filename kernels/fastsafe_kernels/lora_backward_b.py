"""Gradients of the B of many adapters and of what B multiplies, in one pass over dY.

    dS[m, t r + r'] = sum_{o in part t} dY[m, o] B[s(m), o, r'],         0 for base rows
    dB[s, o, r']    = sum_{m: s(m) = s} dY[m, o] S[m, t(o) r + r'],      r' in [0, r)

s(m) is the slot of row m; rows are sorted by slot (`Segments`). Part t is the columns of target t
of a fused projection, as for `lora_expand`. A program takes a tile of the table and a block of
columns: its dB is summed over the rows in registers, its share of dS is kept per block and the
blocks are added in their order. So a row's dS depends on that row alone and an adapter's dB on
its own rows, whoever else is in the batch.

Shapes   dY [M, O], S [M, T r], B [slots, O, r]  ->  dS [M, T r], dB [slots, O, r]
Dtypes   dY fp32, bf16 or fp16; S, B and dS like dY; dB and every sum fp32
Cost     reads dY once (r <= 64); partial sums of dS are O / 256 * M * r, of dB one per tile of an
         adapter but its first
Source   Zhu et al. 2025, arXiv:2510.00206 (LoRAFusion), here without atomics
Used by  fastsafe.train
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._segments import PARTS, Segments, check_parts, example_ids
from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

REDUCE = 1024


def reference(
    dY: Tensor,
    shrunk: Tensor,
    lora_B: Tensor,
    segments: Segments,
    parts: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch: a loop over adapters and targets."""
    r = lora_B.shape[2]
    dS, dB = torch.zeros_like(shrunk), torch.zeros_like(lora_B)
    for begin, end, slot in segments.runs():
        for t, (o0, o1) in enumerate(parts):
            ranks = slice(t * r, (t + 1) * r)
            dS[begin:end, ranks] = dY[begin:end, o0:o1] @ lora_B[slot, o0:o1]
            dB[slot, o0:o1] = dY[begin:end, o0:o1].T @ shrunk[begin:end, ranks]
    return dS, dB


@triton.jit(do_not_specialize=["M"])
def _columns_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    table_ptr,
    spans_ptr,
    db_ptr,
    db_partial_ptr,
    ds_partial_ptr,
    M,
    dy_stride,
    s_stride,
    b_slot_stride,
    b_column_stride,
    O,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    tile = tl.program_id(1)
    # int64: rows of a long batch and slots of a large bank pass 2**31 elements
    row0 = tl.load(table_ptr + tile * 4).to(tl.int64)
    nrows = tl.load(table_ptr + tile * 4 + 1)
    slot = tl.load(table_ptr + tile * 4 + 2).to(tl.int64)
    if slot < 0:
        return
    # blocks are numbered through the parts, and none holds columns of two
    o0 = 0
    o1 = 0
    r0 = 0
    first = 0
    for t in tl.static_range(len(PARTS)):
        reached = block >= first
        o0 = tl.where(reached, PARTS[t][0] + (block - first) * BLOCK_O, o0)
        o1 = tl.where(reached, PARTS[t][1], o1)
        r0 = tl.where(reached, t * RANK, r0)
        first += (PARTS[t][1] - PARTS[t][0] + BLOCK_O - 1) // BLOCK_O
    k = tl.arange(0, BLOCK_K)
    o = o0 + tl.arange(0, BLOCK_O)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep = (o < o1)[:, None] & (r < RANK)[None, :]
    b_ptrs = b_ptr + slot * b_slot_stride + o[:, None] * b_column_stride + r[None, :]
    b = tl.load(b_ptrs, mask=keep, other=0.0)
    dy_ptrs = dy_ptr + (row0 + k)[:, None] * dy_stride + o[None, :]
    s_ptrs = s_ptr + (row0 + k)[:, None] * s_stride + (r0 + r)[None, :]
    at = (block.to(tl.int64) * M + row0 + k)[:, None] * RANK + r[None, :]
    ds_ptrs = ds_partial_ptr + at
    sums = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for start in range(0, nrows, BLOCK_K):
        keep_k = (start + k < nrows)[:, None]
        dy = tl.load(dy_ptrs, mask=keep_k & (o < o1)[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=keep_k & (r < RANK)[None, :], other=0.0)
        ds = tl.dot(dy, b, input_precision="ieee")
        sums += tl.dot(tl.trans(dy), s, input_precision="ieee")
        tl.store(ds_ptrs, ds, mask=keep_k & (r < RANK)[None, :])
        dy_ptrs += BLOCK_K * dy_stride
        s_ptrs += BLOCK_K * s_stride
        ds_ptrs += BLOCK_K * RANK
    at = o[:, None] * RANK + r[None, :]
    if tile == tl.load(spans_ptr + slot * 2):
        tl.store(db_ptr + slot * O * RANK + at, sums, mask=keep)
    else:
        tl.store(db_partial_ptr + tile.to(tl.int64) * O * RANK + at, sums, mask=keep)


@triton.jit(do_not_specialize=["M"])
def _reduce_rows_kernel(
    partial_ptr,
    ds_ptr,
    table_ptr,
    M,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    entry_ptr = table_ptr + tl.program_id(1) * 4
    row0 = tl.load(entry_ptr).to(tl.int64)
    nrows = tl.load(entry_ptr + 1)
    slot = tl.load(entry_ptr + 2)
    if nrows <= tl.program_id(2) * ROWS:
        return
    begin = 0
    end = 0
    first = 0
    for t in tl.static_range(len(PARTS)):
        begin = tl.where(part == t, first, begin)
        first += (PARTS[t][1] - PARTS[t][0] + BLOCK_O - 1) // BLOCK_O
        end = tl.where(part == t, first, end)
    # base rows have no share anywhere: their zeros are written like any other sum
    end = tl.where(slot < 0, begin, end)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, BLOCK_R)
    keep = (m < nrows)[:, None] & (r < RANK)[None, :]
    total = tl.zeros((ROWS, BLOCK_R), tl.float32)
    row_ptrs = partial_ptr + (row0 + m)[:, None] * RANK + r[None, :]
    block0 = M.to(tl.int64) * RANK * begin
    for _ in tl.range(begin, end, loop_unroll_factor=4):
        total += tl.load(row_ptrs + block0, mask=keep, other=0.0)
        block0 += M * RANK
    at = ((row0 + m) * len(PARTS) + part)[:, None] * RANK + r[None, :]
    tl.store(ds_ptr + at, total.to(ds_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _reduce_tiles_kernel(
    partial_ptr, db_ptr, spans_ptr, O, RANK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    slot = tl.program_id(1).to(tl.int64)
    first = tl.load(spans_ptr + slot * 2).to(tl.int64)
    tiles = tl.load(spans_ptr + slot * 2 + 1)
    if tiles == 1:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < O * RANK
    held = at < 0
    for t in tl.static_range(len(PARTS)):
        held |= (at >= PARTS[t][0] * RANK) & (at < PARTS[t][1] * RANK)
    db_ptrs = db_ptr + slot * O * RANK + at
    partial_ptrs = partial_ptr + (first + 1) * O * RANK + at
    total = tl.load(db_ptrs, mask=held & (tiles > 0), other=0.0)
    for _ in range(1, tiles):
        total += tl.load(partial_ptrs, mask=held, other=0.0)
        partial_ptrs += O * RANK
    tl.store(db_ptrs, total, mask=keep)


def lora_backward_b(
    dY: Tensor,
    shrunk: Tensor,
    lora_B: Tensor,
    segments: Segments,
    parts: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Multiply dY by each row's B, and sum dY^T S over each adapter's own rows.

    A row's dS and an adapter's dB have the same bits alone and among others, for one ``block_m``
    of the table.

    Args:
        dY: [M, O] fp32, bf16 or fp16, contiguous in O: gradient of `lora_expand`'s ``y``.
        shrunk: [M, T r] like ``dY``, contiguous in its ranks, as it was given to `lora_expand`.
        lora_B: [slots, O, r] like ``dY``, contiguous in r.
        segments: Table of the M rows. Tiles are summed whole, so that large ones (1024 rows)
            spare memory traffic and small ones give short adapters more programs.
        parts: First column and end of each of the T targets, rising; each set is compiled once.

    Returns:
        dS, [M, T r] like ``dY``, 0 in base rows; and dB, [slots, O, r] fp32, 0 for slots without
        rows and columns of no part. Both contiguous, not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, parts are not columns of ``dY`` or not as many as
            ``shrunk`` holds, or a tensor is strided in its last dimension.
        TypeError: A dtype is not listed above.

    Example:
        >>> dY, shrunk = torch.ones(2, 2), torch.tensor([[1.0], [2.0]])
        >>> lora_B = torch.tensor([[[3.0], [4.0]]])
        >>> segments = Segments.build([0, 0], num_slots=1)
        >>> dS, dB = lora_backward_b(dY, shrunk, lora_B, segments, ((0, 2),))
        >>> dS.tolist(), dB.tolist()
        ([[7.0], [7.0]], [[[3.0], [3.0]]])
    """
    op = "lora_backward_b"
    args = {"shrunk": (shrunk, "M R", (dY.dtype,)), "lora_B": (lora_B, "slots O r", (dY.dtype,))}
    size = match(op, dY=(dY, "M O", FLOATS), **args)
    M, O, R, r = size["M"], size["O"], size["R"], size["r"]
    segments.check(op, ("dY", dY), ("lora_B", lora_B))
    check_parts(op, parts, O, ("shrunk", R, r))
    for name, t, letter in (("dY", dY, "O"), ("shrunk", shrunk, "R"), ("lora_B", lora_B, "r")):
        if t.stride(-1) != 1:
            stride = f"stride {t.stride(-1)} in {letter}, expected 1"
            raise ValueError(f"{op}: {name} has {stride}; call .contiguous()")
    if runs_reference(dY):
        dS, dB = reference(dY, shrunk, lora_B, segments, parts)
        return dS, dB.to(torch.float32)
    dS = torch.empty(M, R, dtype=dY.dtype, device=dY.device)
    whole = sum(end - begin for begin, end in parts) == O
    new = torch.empty if whole else torch.zeros
    dB = new(lora_B.shape, dtype=torch.float32, device=dY.device)
    if dB.numel() == 0 or not parts:
        return dS.zero_(), dB
    block_r = min(max(16, triton.next_power_of_2(r)), 64)
    if dY.element_size() == 2:
        # two programs share an SM up to rank 32
        block_o, block_k, stages = 256, 64, 2 if block_r <= 32 else 3
    else:  # no matrix units: operands live in registers
        block_o, block_k, stages, block_r = 32, 32, 2, 16
    blocks = sum(triton.cdiv(end - begin, block_o) for begin, end in parts)
    fixed = {"RANK": r, "PARTS": tuple((int(begin), int(end)) for begin, end in parts)}
    dS_partial = dB.new_empty(blocks, M, r)
    dB_partial = dB.new_empty(segments.capacity, O, r)
    if M:
        _columns_kernel[(blocks, segments.capacity, triton.cdiv(r, block_r))](
            dY,
            shrunk,
            lora_B,
            segments.table,
            segments.spans,
            dB,
            dB_partial,
            dS_partial,
            M,
            dY.stride(0),
            shrunk.stride(0),
            lora_B.stride(0),
            lora_B.stride(1),
            O,
            **fixed,
            BLOCK_O=block_o,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            num_warps=8 if block_r == 64 else 4,
            num_stages=stages,
        )
        columns = triton.next_power_of_2(r)
        rows = max(1, REDUCE // columns)
        _reduce_rows_kernel[(len(parts), segments.capacity, triton.cdiv(segments.block_m, rows))](
            dS_partial,
            dS,
            segments.table,
            M,
            **fixed,
            BLOCK_O=block_o,
            BLOCK_R=columns,
            ROWS=rows,
        )
    grid = (triton.cdiv(O * r, REDUCE), segments.num_slots)
    _reduce_tiles_kernel[grid](dB_partial, dB, segments.spans, O, **fixed, BLOCK=REDUCE)
    return dS, dB


def _make(
    dims: Dims, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Segments, tuple[tuple[int, int], ...]]:
    """Adapters of less than a tile and of several, one without rows; unlike targets."""
    M, slots, r = dims["M"], dims["slots"], dims["rank"]
    parts = PARTS[dims["fused"]]
    O = parts[-1][1] + dims["base"]  # columns of no part, in tests
    ids = example_ids(M, slots, dims["base"])
    segments = Segments.build(ids, slots, dims["block_m"], device=device)
    dY = torch.randn(M, O, device=device).to(dtype)
    shrunk = torch.randn(M, len(parts) * r, device=device).to(dtype)
    lora_B = torch.randn(slots, O, r, device=device).to(dtype)
    return dY, shrunk, lora_B, segments, parts


_TRAINING = {"M": 16_384, "slots": 32, "base": 0, "block_m": 1024}

KERNEL = Kernel(
    fn=lora_backward_b,
    reference=reference,
    make=_make,
    tests=(
        {"M": 1, "slots": 1, "fused": 0, "rank": 1, "base": 0, "block_m": 16},
        {"M": 75, "slots": 4, "fused": 1, "rank": 19, "base": 4, "block_m": 32},
        {"M": 140, "slots": 2, "fused": 1, "rank": 66, "base": 7, "block_m": 80},
        {"M": 71, "slots": 3, "fused": 2, "rank": 16, "base": 0, "block_m": 16},
    ),
    bench=(
        _TRAINING | {"fused": 4, "rank": 16},
        _TRAINING | {"fused": 3, "rank": 32},
        _TRAINING | {"fused": 5, "rank": 64},
    ),
    min_bytes=lambda d, dtype: (
        (
            PARTS[d["fused"]][-1][1] * (d["M"] + d["slots"] * d["rank"])
            + 2 * d["M"] * len(PARTS[d["fused"]]) * d["rank"]
        )
        * dtype.itemsize
        + 4 * d["slots"] * PARTS[d["fused"]][-1][1] * d["rank"]
    ),
    flops=lambda d: 4 * d["M"] * PARTS[d["fused"]][-1][1] * d["rank"],
    wgmma=("_columns_kernel",),
)
