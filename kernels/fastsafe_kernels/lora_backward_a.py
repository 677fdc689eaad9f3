"""Gradient of the A of many adapters, each over its own rows.

    dA[s, r, i] = sum_{m: s(m) = s} dS[m, r] X[m, i]

s(m) is the slot of row m; rows are sorted by slot (`Segments`). A tile of the table is summed by
one program, an adapter's tiles are then added in their order: its bits are a function of its own
rows, whoever else is in the batch.

Shapes   dS [M, R], X [M, I]  ->  dA [slots, R, I];  R holds the ranks of all targets of X
Dtypes   dS fp32, bf16 or fp16; X like dS; dA and every sum fp32
Cost     reads X once (R <= 128); writes dA, and a partial sum per tile of an adapter but its first
Source   Zhu et al. 2025, arXiv:2510.00206 (LoRAFusion; there one adapter's rows per launch)
Used by  fastsafe.train
"""

import torch
from torch import Tensor

from ._segments import Segments, example_ids
from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

REDUCE = 1024


def reference(dS: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """Define the op in plain torch: a loop over adapters."""
    dA = x.new_zeros(segments.num_slots, dS.shape[1], x.shape[1])
    for begin, end, slot in segments.runs():
        dA[slot] = dS[begin:end].T @ x[begin:end]
    return dA


@triton.jit
def _outer_kernel(
    s_ptr,
    x_ptr,
    table_ptr,
    spans_ptr,
    da_ptr,
    partial_ptr,
    s_stride,
    x_stride,
    I,
    R,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    # int64: rows of a long batch and slots of a large bank pass 2**31 elements
    row0 = tl.load(table_ptr + tile * 4).to(tl.int64)
    nrows = tl.load(table_ptr + tile * 4 + 1)
    slot = tl.load(table_ptr + tile * 4 + 2).to(tl.int64)
    if slot < 0:
        return
    k = tl.arange(0, BLOCK_K)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # inputs are the long side of the product: Hopper's matrix units want 64 of them
    x_ptrs = x_ptr + (row0 + k)[None, :] * x_stride + i[:, None]
    s_ptrs = s_ptr + (row0 + k)[:, None] * s_stride + r[None, :]
    sums = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    for start in range(0, nrows, BLOCK_K):
        keep_k = start + k < nrows
        x = tl.load(x_ptrs, mask=keep_k[None, :] & (i < I)[:, None], other=0.0)
        s = tl.load(s_ptrs, mask=keep_k[:, None] & (r < R)[None, :], other=0.0)
        sums += tl.dot(x, s, input_precision="ieee")
        x_ptrs += BLOCK_K * x_stride
        s_ptrs += BLOCK_K * s_stride
    at = r[None, :] * I + i[:, None]
    keep = (r < R)[None, :] & (i < I)[:, None]
    if tile == tl.load(spans_ptr + slot * 2):
        tl.store(da_ptr + slot * R * I + at, sums, mask=keep)
    else:
        tl.store(partial_ptr + tile.to(tl.int64) * R * I + at, sums, mask=keep)


@triton.jit
def _reduce_kernel(partial_ptr, da_ptr, spans_ptr, I, R, BLOCK: tl.constexpr):
    slot = tl.program_id(1).to(tl.int64)
    first = tl.load(spans_ptr + slot * 2).to(tl.int64)
    tiles = tl.load(spans_ptr + slot * 2 + 1)
    if tiles == 1:
        return
    n = R * I
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    da_ptrs = da_ptr + slot * n + at
    partial_ptrs = partial_ptr + (first + 1) * n + at
    total = tl.load(da_ptrs, mask=keep & (tiles > 0), other=0.0)
    for _ in range(1, tiles):
        total += tl.load(partial_ptrs, mask=keep, other=0.0)
        partial_ptrs += n
    tl.store(da_ptrs, total, mask=keep)


def lora_backward_a(dS: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """Sum dS^T X over each adapter's own rows.

    An adapter's result has the same bits alone and among others, for one ``block_m`` of the table.

    Args:
        dS: [M, R] fp32, bf16 or fp16, contiguous in R: gradient of `lora_shrink`'s result.
        x: [M, I] like ``dS``, contiguous in I: its input.
        segments: Table of the M rows. Tiles are summed whole, so that large ones (1024 rows)
            spare memory traffic and small ones give short adapters more programs.

    Returns:
        [slots, R, I] fp32, contiguous; 0 for slots without rows. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, or a tensor is strided in its last dimension.
        TypeError: A dtype is not listed above.

    Example:
        >>> dS, x = torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 2)
        >>> lora_backward_a(dS, x, Segments.build([-1, 0, 0], num_slots=2))
        tensor([[[5., 5.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    op = "lora_backward_a"
    size = match(op, dS=(dS, "M R", FLOATS), x=(x, "M I", (dS.dtype,)))
    I, R = size["I"], size["R"]
    segments.check(op, ("dS", dS), None)
    for name, t, letter in (("dS", dS, "R"), ("x", x, "I")):
        if t.stride(1) != 1:
            stride = f"stride {t.stride(1)} in {letter}, expected 1"
            raise ValueError(f"{op}: {name} has {stride}; call .contiguous()")
    if runs_reference(dS):
        return reference(dS, x, segments).to(torch.float32)
    dA = torch.empty(segments.num_slots, R, I, dtype=torch.float32, device=x.device)
    if dA.numel() == 0:
        return dA
    partial = dA.new_empty(segments.capacity, R, I)
    block_r = min(max(16, triton.next_power_of_2(R)), 128)
    if x.element_size() == 2:
        block_i, block_k, stages = 128, 64, 4
    else:  # no matrix units: operands live in registers
        block_i, block_k, stages = 64, 16, 2
    if segments.capacity:
        _outer_kernel[(triton.cdiv(I, block_i), segments.capacity, triton.cdiv(R, block_r))](
            dS,
            x,
            segments.table,
            segments.spans,
            dA,
            partial,
            dS.stride(0),
            x.stride(0),
            I,
            R,
            BLOCK_I=block_i,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            num_warps=8 if block_r == 128 else 4,
            num_stages=stages,
        )
    grid = (triton.cdiv(R * I, REDUCE), segments.num_slots)
    _reduce_kernel[grid](partial, dA, segments.spans, I, R, BLOCK=REDUCE)
    return dA


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Segments]:
    """Adapters of less than a tile and of several, one without rows."""
    M, I, slots, R = dims["M"], dims["I"], dims["slots"], dims["R"]
    ids = example_ids(M, slots, dims["base"])
    segments = Segments.build(ids, slots, dims["block_m"], device=device)
    dS = torch.randn(M, R, device=device).to(dtype)
    return dS, torch.randn(M, I, device=device).to(dtype), segments


_TRAINING = {"M": 16_384, "slots": 32, "base": 0, "block_m": 1024}

KERNEL = Kernel(
    fn=lora_backward_a,
    reference=reference,
    make=_make,
    tests=(
        {"M": 1, "I": 3, "R": 1, "slots": 1, "base": 0, "block_m": 16},
        {"M": 75, "I": 131, "R": 19, "slots": 4, "base": 4, "block_m": 32},
        {"M": 140, "I": 64, "R": 130, "slots": 2, "base": 7, "block_m": 80},
    ),
    bench=(
        _TRAINING | {"I": 4096, "R": 48},
        _TRAINING | {"I": 4096, "R": 128},
        _TRAINING | {"I": 14_336, "R": 16},
    ),
    min_bytes=lambda d, dtype: (
        d["M"] * (d["I"] + d["R"]) * dtype.itemsize + 4 * d["slots"] * d["R"] * d["I"]
    ),
    flops=lambda d: 2 * d["M"] * d["I"] * d["R"],
    wgmma=("_outer_kernel",),
)
