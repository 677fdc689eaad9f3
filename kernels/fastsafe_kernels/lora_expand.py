"""Second half of many LoRA updates: add B S to every row, with the B of its own adapter.

    y[m, o] += sum_r S[m, t(o) * r + r'] B[s(m), o, r'],        r' in [0, r)

s(m) is the slot of row m; rows are sorted by slot (`Segments`), and base rows keep their bits.
t(o) is the target that output column o belongs to: part t is the columns [begin_t, end_t) of a
fused projection (q, k and v), and uses ranks [t r, (t + 1) r) of S. B holds each column's own r
ranks alone, so the zeros of the block-diagonal matrix are neither stored nor multiplied. Columns
of no part keep their bits too.

With lora_A transposed in the role of B and one part, the same op is dX += dS A of the backward.

Shapes   y [M, O], S [M, T r], B [slots, O, r]  ->  y in place
Dtypes   y fp32, bf16 or fp16; S and B like y; the sum and y + sum fp32, rounded once
Cost     reads and writes y once; reads S, and B once per tile of an adapter present
Source   Chen et al. 2023, arXiv:2310.18547 (SGMV)
Used by  fastsafe.model (adapters in one batch), fastsafe.train
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._segments import PARTS, TILES, Segments, check_parts, example_ids
from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton


def reference(
    y: Tensor,
    shrunk: Tensor,
    lora_B: Tensor,
    segments: Segments,
    parts: Sequence[tuple[int, int]],
    targets: int = 1,
) -> None:
    """Define the op in plain torch: a loop over adapters and targets."""
    r = lora_B.shape[2]
    for begin, end, slot in segments.runs():
        for t, (o0, o1) in enumerate(parts):
            own = shrunk[begin:end, t * r : (t + 1) * r]
            y[begin:end, o0:o1] += own @ lora_B[slot, o0:o1].T


@triton.jit
def _expand_kernel(
    y_ptr,
    s_ptr,
    b_ptr,
    table_ptr,
    y_stride,
    s_stride,
    b_slot_stride,
    b_column_stride,
    b_rank_stride,
    RANK: tl.constexpr,
    TARGETS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block = tl.program_id(0)
    entry_ptr = table_ptr + tl.program_id(1) * 4
    # int64: rows of a long batch and slots of a large bank pass 2**31 elements
    row0 = tl.load(entry_ptr).to(tl.int64)
    nrows = tl.load(entry_ptr + 1)
    slot = tl.load(entry_ptr + 2).to(tl.int64)
    # whole groups of 8 ranks, so that 16 bytes stay one load
    groups = (tl.load(entry_ptr + 3) - 1) // 8 + 1
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
    m = tl.arange(0, BLOCK_M)
    o = o0 + tl.arange(0, BLOCK_O)
    keep_m = m < nrows
    keep_o = o < o1
    y_ptrs = y_ptr + (row0 + m)[None, :] * y_stride + o[:, None]
    keep = keep_m[None, :] & keep_o[:, None]
    y = tl.load(y_ptrs, mask=keep, other=0.0)
    # columns are the long side of the product: Hopper's matrix units want 64 of them, and a
    # decode tile has 16 rows
    sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        own = r
        if TARGETS > 1:
            own = r % (RANK // TARGETS)
        keep_r = (r < RANK) & (own // 8 < groups)
        b_ptrs = b_ptr + slot * b_slot_stride + o[:, None] * b_column_stride
        b_ptrs += r[None, :] * b_rank_stride
        b = tl.load(b_ptrs, mask=keep_o[:, None] & keep_r[None, :], other=0.0)
        s_ptrs = s_ptr + (row0 + m)[None, :] * s_stride + (r0 + r)[:, None]
        s = tl.load(s_ptrs, mask=keep_m[None, :] & keep_r[:, None], other=0.0)
        sums += tl.dot(b, s, input_precision="ieee")
    tl.store(y_ptrs, (y.to(tl.float32) + sums).to(y_ptr.dtype.element_ty), mask=keep)


def lora_expand(
    y: Tensor,
    shrunk: Tensor,
    lora_B: Tensor,
    segments: Segments,
    parts: Sequence[tuple[int, int]],
    targets: int = 1,
) -> None:
    """Add the updates of all targets of a fused projection to ``y`` in place.

    A row's result has the same bits whatever the other rows are, for one ``block_m`` of the table.

    Args:
        y: [M, O] fp32, bf16 or fp16, contiguous in O. Written, but for base rows and columns of no
            part.
        shrunk: [M, T r] like ``y``, contiguous in its ranks: `lora_shrink` of T targets.
        lora_B: [slots, O, r] like ``y``, scaling folded in, contiguous in r or in O (``lora_A``
            transposed). What lies behind an adapter's own rank is zero, or finite where the
            ranks of ``shrunk`` are zero.
        segments: Table of the M rows, in tiles of 16, 32, 64 or 128 rows. Where it has ranks, at
            most 7 more are read of each column.
        parts: First column and end of each of the T targets, rising; each set is compiled once.
        targets: Modules whose ranks are stacked in r, each with r / targets of them: more than 1
            where ``lora_A`` has the role of B. What the table's ranks leave out lies behind each.

    Raises:
        ValueError: Shapes or devices disagree, parts are not columns of ``y`` or not as many as
            ``shrunk`` holds, or a tensor is strided.
        TypeError: A dtype is not listed above.

    Example:
        >>> y, shrunk = torch.zeros(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> lora_B = torch.ones(1, 3, 1)
        >>> segments = Segments.build([-1, 0], num_slots=1)
        >>> lora_expand(y, shrunk, lora_B, segments, ((0, 2), (2, 3)))
        >>> y
        tensor([[0., 0., 0.],
                [3., 3., 4.]])
    """
    op = "lora_expand"
    args = {"shrunk": (shrunk, "M R", (y.dtype,)), "lora_B": (lora_B, "slots O r", (y.dtype,))}
    size = match(op, y=(y, "M O", FLOATS), **args)
    O, r = size["O"], size["r"]
    segments.check(op, ("y", y), ("lora_B", lora_B), TILES)
    if targets < 1 or r % targets:
        raise ValueError(f"{op}: targets is {targets}, expected a divisor of r={r}")
    check_parts(op, parts, O, ("shrunk", size["R"], r))
    for name, t, letter in (("y", y, "O"), ("shrunk", shrunk, "R")):
        if t.stride(1) != 1:
            stride = f"stride {t.stride(1)} in {letter}, expected 1"
            raise ValueError(f"{op}: {name} has {stride}; call .contiguous()")
    if 1 not in lora_B.stride()[1:]:
        strides = f"strides {list(lora_B.stride()[1:])} in O and r, expected 1 in one of them"
        raise ValueError(f"{op}: lora_B has {strides}; call .contiguous()")
    if runs_reference(y):
        return reference(y, shrunk, lora_B, segments, parts, targets)
    if y.shape[0] == 0 or r == 0 or not parts:
        return None
    block_m = segments.block_m
    block_o = 256 if block_m < 64 else 128
    block_r = min(max(16, triton.next_power_of_2(r)), 64)
    if y.element_size() == 4:  # no matrix units: operands live in registers
        block_o, block_r = 64 if block_m < 64 else 32, 16
    blocks = sum(triton.cdiv(end - begin, block_o) for begin, end in parts)
    _expand_kernel[(blocks, segments.capacity)](
        y,
        shrunk,
        lora_B,
        segments.table,
        y.stride(0),
        shrunk.stride(0),
        *lora_B.stride(),
        RANK=r,
        TARGETS=targets,
        PARTS=tuple((int(begin), int(end)) for begin, end in parts),
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        BLOCK_R=block_r,
        num_warps=8 if block_m == 128 else 4,
    )
    return None


def _make(
    dims: Dims, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Segments, tuple[tuple[int, int], ...]]:
    """Fused projections of T unlike targets; B transposed in memory where dims ask for it."""
    M, slots, r = dims["M"], dims["slots"], dims["rank"]
    parts = PARTS[dims["fused"]]
    O = parts[-1][1] + dims["base"]  # columns of no part, in tests
    ids = example_ids(M, slots, dims["base"])
    segments = Segments.build(ids, slots, dims["block_m"], device=device)
    y = torch.randn(M, O, device=device).to(dtype)
    shrunk = torch.randn(M, len(parts) * r, device=device).to(dtype)
    lora_B = torch.randn(slots, O, r, device=device).to(dtype)
    if dims.get("transposed"):
        lora_B = lora_B.transpose(1, 2).contiguous().transpose(1, 2)
    return y, shrunk, lora_B, segments, parts


_DECODE = {"M": 1024, "slots": 64, "base": 0, "block_m": 16}
_TRAINING = {"M": 16_384, "slots": 32, "base": 0, "block_m": 128}

KERNEL = Kernel(
    fn=lora_expand,
    reference=reference,
    make=_make,
    tests=(
        {"M": 1, "slots": 1, "fused": 0, "rank": 1, "base": 0, "block_m": 16},
        {"M": 37, "slots": 4, "fused": 1, "rank": 20, "base": 5, "block_m": 16, "transposed": 1},
        {"M": 150, "slots": 3, "fused": 1, "rank": 72, "base": 1, "block_m": 64},
        {"M": 41, "slots": 4, "fused": 2, "rank": 16, "base": 3, "block_m": 16},
    ),
    bench=(
        _DECODE | {"fused": 4, "rank": 16},
        _DECODE | {"fused": 3, "rank": 16},
        _DECODE | {"fused": 5, "rank": 16},
        _DECODE | {"fused": 4, "rank": 64},
        _TRAINING | {"fused": 4, "rank": 16},
        _TRAINING | {"fused": 5, "rank": 64},
        _TRAINING | {"fused": 3, "rank": 48, "transposed": 1},
    ),
    min_bytes=lambda d, dtype: (
        (
            PARTS[d["fused"]][-1][1] * (2 * d["M"] + d["slots"] * d["rank"])
            + d["M"] * len(PARTS[d["fused"]]) * d["rank"]
        )
        * dtype.itemsize
    ),
    flops=lambda d: 2 * d["M"] * PARTS[d["fused"]][-1][1] * d["rank"],
    mutates=(0,),
    wgmma=("_expand_kernel",),
)
