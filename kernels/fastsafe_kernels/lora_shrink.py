"""First half of many LoRA updates: every row times the A of its own adapter.

    y[m, r] = sum_i x[m, i] A[s(m), r, i],        0 for base rows

s(m) is the slot of row m; rows are sorted by slot (`Segments`). A holds the A of all targets of a
fused projection (q, k and v) one below the other: they read the same x.

Shapes   x [M, I], A [slots, R, I]  ->  y [M, R]
Dtypes   x fp32, bf16 or fp16; A and y like x: y is the operand of the next product; sums fp32
Cost     reads x once and A once per tile of an adapter present; partial sums are I / 1024 * M * R
Source   Chen et al. 2023, arXiv:2310.18547 (SGMV); here without atomics
Used by  fastsafe.model (adapters in one batch), fastsafe.train
"""

import torch
from torch import Tensor

from ._segments import TILES, Segments, example_ids
from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# Inputs summed by one program: 64 adapters of 16 rows at I = 4096 are then 256 programs. The sum
# is cut by I alone, so that a row has the same bits in any batch.
SPLIT = 1024
REDUCE = 1024


def reference(x: Tensor, lora_A: Tensor, segments: Segments, targets: int = 1) -> Tensor:
    """Define the op in plain torch: a loop over adapters."""
    y = x.new_zeros(x.shape[0], lora_A.shape[1])
    for begin, end, slot in segments.runs():
        y[begin:end] = x[begin:end] @ lora_A[slot].T
    return y


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    table_ptr,
    y_ptr,
    M,
    x_stride,
    a_slot_stride,
    a_rank_stride,
    I,
    R,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0)
    entry_ptr = table_ptr + tl.program_id(1) * 4
    # int64: rows of a long batch and slots of a large bank pass 2**31 elements
    row0 = tl.load(entry_ptr).to(tl.int64)
    nrows = tl.load(entry_ptr + 1)
    slot = tl.load(entry_ptr + 2).to(tl.int64)
    rank = tl.load(entry_ptr + 3)
    if nrows == 0:
        return
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    keep_m = (m < nrows)[:, None]
    keep_r = ((r < R) & (r % RANK < rank))[None, :]
    x_ptrs = x_ptr + (row0 + m)[:, None] * x_stride + k[None, :]
    a_ptrs = a_ptr + slot * a_slot_stride + r[None, :] * a_rank_stride + k[:, None]
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, I)
    # base rows read nothing: their zeros are written like any other sum
    end = tl.where(slot < 0, begin, end)
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_K):
        keep_k = start + k < end
        x = tl.load(x_ptrs + start, mask=keep_m & keep_k[None, :], other=0.0)
        a = tl.load(a_ptrs + start, mask=keep_r & keep_k[:, None], other=0.0)
        sums += tl.dot(x, a, input_precision="ieee")
    at = (split * M + row0 + m)[:, None] * R + r[None, :]
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=keep_m & (r < R)[None, :])


@triton.jit(do_not_specialize=["M"])
def _reduce_kernel(partial_ptr, y_ptr, M, R, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    n = M.to(tl.int64) * R
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * n + at, mask=keep, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=keep)


def lora_shrink(x: Tensor, lora_A: Tensor, segments: Segments, targets: int = 1) -> Tensor:
    """Multiply each row by the A of its adapter.

    A row's result has the same bits whatever the other rows are, for one ``block_m`` of the table.

    Args:
        x: [M, I] fp32, bf16 or fp16, contiguous in I.
        lora_A: [slots, R, I] like ``x``, contiguous in I. What lies behind an adapter's own ranks
            is zero.
        segments: Table of the M rows, in tiles of 16, 32, 64 or 128 rows.
        targets: Modules whose A are stacked in R, each with R / targets ranks. Of each of them the
            first ``ranks`` of the table are read, where the table has ranks.

    Returns:
        [M, R] like ``x``, contiguous, 0 in base rows. Not differentiable by itself.

    Raises:
        ValueError: Shapes or devices disagree, or a tensor is strided in I.
        TypeError: A dtype is not listed above.

    Example:
        >>> x, lora_A = torch.ones(3, 2), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> lora_shrink(x, lora_A, Segments.build([-1, 0, 1], num_slots=2))
        tensor([[0.],
                [3.],
                [7.]])
    """
    op = "lora_shrink"
    size = match(op, x=(x, "M I", FLOATS), lora_A=(lora_A, "slots R I", (x.dtype,)))
    M, I, R = size["M"], size["I"], size["R"]
    segments.check(op, ("x", x), ("lora_A", lora_A), TILES)
    for name, t in (("x", x), ("lora_A", lora_A)):
        if t.stride(-1) != 1:
            stride = f"stride {t.stride(-1)} in I, expected 1"
            raise ValueError(f"{op}: {name} has {stride}; call .contiguous()")
    if targets < 1 or R % targets:
        raise ValueError(f"{op}: targets is {targets}, expected a divisor of R={R}")
    if runs_reference(x):
        return reference(x, lora_A, segments, targets)
    y = torch.empty(M, R, dtype=x.dtype, device=x.device)
    if M * R == 0:
        return y
    splits = max(1, triton.cdiv(I, SPLIT))
    partial = y if splits == 1 else x.new_empty(splits, M, R, dtype=torch.float32)
    block_m = segments.block_m
    block_r = min(max(16, triton.next_power_of_2(R)), 64 if block_m < 64 else 128)
    # a decode tile streams A and wants many bytes in flight, a training tile reuses it
    block_k = (128 if block_m < 64 else 64) if x.element_size() == 2 else 32
    _shrink_kernel[(splits, segments.capacity, triton.cdiv(R, block_r))](
        x,
        lora_A,
        segments.table,
        partial,
        M,
        x.stride(0),
        lora_A.stride(0),
        lora_A.stride(1),
        I,
        R,
        RANK=R // targets,
        SPLIT=SPLIT,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        num_warps=8 if block_m * block_r > 8192 else 4,
        num_stages=4 if x.element_size() == 2 else 2,
    )
    if splits > 1:
        grid = (triton.cdiv(M * R, REDUCE),)
        _reduce_kernel[grid](partial, y, M, R, SPLITS=splits, BLOCK=REDUCE)
    return y


def _make(
    dims: Dims, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Segments, int]:
    """Few rows of some adapters, many of others, one adapter without rows."""
    M, I, slots, targets = dims["M"], dims["I"], dims["slots"], dims["targets"]
    R = targets * dims["rank"]
    ids = example_ids(M, slots, dims["base"])
    segments = Segments.build(ids, slots, dims["block_m"], device=device)
    x = torch.randn(M, I, device=device).to(dtype)
    lora_A = (torch.randn(slots, R, I, device=device) / I**0.5).to(dtype)
    return x, lora_A, segments, targets


def _decode(I: int, targets: int, rank: int = 16) -> dict[str, int]:
    rows = {"M": 1024, "slots": 64, "base": 0, "block_m": 16}
    return rows | {"I": I, "targets": targets, "rank": rank}


def _training(I: int, targets: int, rank: int = 16) -> dict[str, int]:
    rows = {"M": 16_384, "slots": 32, "base": 0, "block_m": 128}
    return rows | {"I": I, "targets": targets, "rank": rank}


KERNEL = Kernel(
    fn=lora_shrink,
    reference=reference,
    make=_make,
    tests=(
        {"M": 1, "I": 5, "slots": 1, "targets": 1, "rank": 3, "base": 0, "block_m": 16},
        {"M": 37, "I": 97, "slots": 4, "targets": 3, "rank": 8, "base": 5, "block_m": 16},
        {"M": 150, "I": 72, "slots": 3, "targets": 2, "rank": 40, "base": 1, "block_m": 64},
        {"M": 20, "I": SPLIT + 6, "slots": 2, "targets": 1, "rank": 70, "base": 2, "block_m": 32},
    ),
    bench=(
        _decode(4096, 3),
        _decode(4096, 1),
        _decode(14_336, 1),
        _decode(4096, 2, 64),
        _training(4096, 3),
        _training(4096, 2, 64),
        _training(14_336, 1),
    ),
    min_bytes=lambda d, dtype: (
        (d["M"] * d["I"] + (d["slots"] * d["I"] + d["M"]) * d["targets"] * d["rank"])
        * dtype.itemsize
    ),
    flops=lambda d: 2 * d["M"] * d["I"] * d["targets"] * d["rank"],
)
