"""Many LoRA updates of one fused projection, differentiable: shrink, expand and their gradients.

    y[m] += B(s(m)) A(s(m)) x[m];      with S = x A^T and dS = dy B, per adapter:
    dx = dS A,     dA = dS^T x,     dB = dy^T S,     and dy goes on to what y was

s(m) is the slot of row m; rows are sorted by slot (`Segments`). B has a block for each target of
the projection, as `lora_expand` explains.

Shapes   y [M, O], x [M, I], A [slots, T r, I], B [slots, O, r]  ->  y
Dtypes   y fp32, bf16 or fp16; x like y; A and B of any of them, multiplied in that of x; sums fp32
Cost     that of `lora_shrink` and `lora_expand`; backward `lora_backward_b`, `lora_backward_a` and
         `lora_expand` on zeros. A function that holds the frozen product too should call these
         itself and expand into its dx
Source   Hu et al. 2021, arXiv:2106.09685
Used by  fastsafe.train
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._segments import PARTS, Segments, example_ids
from ._spec import FLOATS, Dims, Kernel, match
from .lora_backward_a import lora_backward_a
from .lora_backward_b import lora_backward_b
from .lora_expand import lora_expand
from .lora_shrink import lora_shrink


def reference(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    tiles: Segments,
    sums: Segments,
    parts: Sequence[tuple[int, int]],
) -> Tensor:
    """Define the op in plain torch: a loop over adapters and targets."""
    r = lora_B.shape[2]
    for begin, end, slot in tiles.runs():
        shrunk = x[begin:end] @ lora_A[slot].to(x.dtype).T
        for t, (o0, o1) in enumerate(parts):
            own = shrunk[:, t * r : (t + 1) * r]
            y[begin:end, o0:o1] += own @ lora_B[slot, o0:o1].to(x.dtype).T
    return y


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        tiles: Segments,
        sums: Segments,
        parts: Sequence[tuple[int, int]],
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        shrunk = lora_shrink(x, A, tiles, len(parts))
        lora_expand(y, shrunk, B, tiles, parts)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, shrunk, A, B)
        ctx.segments, ctx.parts = (tiles, sums), parts
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, shrunk, A, B = ctx.saved_tensors
        tiles, sums = ctx.segments
        dy = grads[0].contiguous()
        dS, dB = lora_backward_b(dy, shrunk, B, sums, ctx.parts)
        dA = lora_backward_a(dS, x, sums)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x)
            inputs = ((0, x.shape[1]),)
            lora_expand(dx, dS, A.transpose(1, 2), tiles, inputs, targets=len(ctx.parts))
        return dy, dx, dA, dB, None, None, None


def grouped_lora(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    tiles: Segments,
    sums: Segments,
    parts: Sequence[tuple[int, int]],
) -> Tensor:
    """Add each row's LoRA update to ``y`` in place, differentiably.

    Gradients of one adapter have the same bits alone and among others, for one ``block_m`` of each
    table. The tables must not be updated between forward and backward.

    Args:
        y: [M, O] fp32, bf16 or fp16, contiguous in O: the frozen product. Written; autograd takes
            the result in its place.
        x: [M, I] like ``y``, contiguous in I.
        lora_A: [slots, T r, I] of a dtype above, contiguous in I.
        lora_B: [slots, O, r] of a dtype above, contiguous in r, scaling folded in.
        tiles: Table of the M rows in tiles of 16, 32, 64 or 128 rows.
        sums: Table of the same rows in the tiles of the sums over rows, such as 1024.
        parts: First column and end of each of the T targets, rising.

    Returns:
        ``y``. Differentiable in ``y``, ``x``, ``lora_A`` and ``lora_B``, once.

    Raises:
        ValueError: Shapes or devices disagree, or a tensor is strided in its last dimension.
        TypeError: A dtype is not listed above.

    Example:
        >>> ids, x = [-1, 0], torch.ones(2, 3)
        >>> lora_A, lora_B = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
        >>> table = Segments.build(ids, num_slots=1)
        >>> grouped_lora(torch.zeros(2, 2), x, lora_A, lora_B, table, table, ((0, 2),))
        tensor([[0., 0.],
                [3., 3.]])
    """
    op = "grouped_lora"
    A, B = (lora_A, "slots R I", FLOATS), (lora_B, "slots O r", FLOATS)
    match(op, y=(y, "M O", FLOATS), x=(x, "M I", (y.dtype,)), lora_A=A, lora_B=B)
    sums.check(op, ("x", x), ("lora_A", lora_A))
    result: Tensor = _GroupedLora.apply(y, x, lora_A, lora_B, tiles, sums, parts)
    return result


def _make(
    dims: Dims, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Segments, Segments, tuple[tuple[int, int], ...]]:
    """Adapters of less than a tile and of several, one without rows; unlike targets."""
    M, I, slots, r = dims["M"], dims["I"], dims["slots"], dims["rank"]
    parts = PARTS[dims["fused"]]
    O = parts[-1][1] + dims["base"]  # columns of no part, in tests
    ids = example_ids(M, slots, dims["base"])
    tiles = Segments.build(ids, slots, dims["block_m"], device=device)
    sums = Segments.build(ids, slots, dims["sums"], device=device)
    y, x = torch.randn(M, O, device=device), torch.randn(M, I, device=device)
    lora_A = torch.randn(slots, len(parts) * r, I, device=device) / I**0.5
    lora_B = torch.randn(slots, O, r, device=device)
    return y.to(dtype), x.to(dtype), lora_A.to(dtype), lora_B.to(dtype), tiles, sums, parts


_TRAINING = {"M": 16_384, "slots": 32, "base": 0, "block_m": 128, "sums": 1024}

KERNEL = Kernel(
    fn=grouped_lora,
    reference=reference,
    make=_make,
    tests=(
        {"M": 3, "I": 2, "slots": 1, "fused": 0, "rank": 2, "base": 0, "block_m": 16, "sums": 16},
        {"M": 61, "I": 35, "slots": 4, "fused": 1, "rank": 9, "base": 4, "block_m": 16, "sums": 32},
    ),
    bench=(
        _TRAINING | {"I": 4096, "fused": 4, "rank": 16},
        _TRAINING | {"I": 14_336, "fused": 3, "rank": 16},
    ),
    min_bytes=lambda d, dtype: (
        (
            d["M"] * (2 * PARTS[d["fused"]][-1][1] + d["I"])
            + d["slots"] * d["rank"] * (PARTS[d["fused"]][-1][1] + len(PARTS[d["fused"]]) * d["I"])
        )
        * dtype.itemsize
    ),
    grads=(1, 2, 3),
    mutates=(0,),
    wgmma=("_shrink_kernel", "_expand_kernel", "_columns_kernel", "_outer_kernel"),
)
