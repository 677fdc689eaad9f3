"""Product with a weight in which a row's bits do not depend on the other rows.

    y[m, n] = sum_k x[m, k] * w[n, k]

The sum runs over k from 0 upwards in blocks of BLOCK_K and is never split, so its order is the same
for every number of rows. How many rows and outputs one program computes does follow the number of
rows: that changes who computes a sum, not the sum. Few rows take the 64 rows of the matrix unit
from w and lie on its other side (y^T = w x^T), or Hopper's wgmma, which needs 64, would be left for
mma.sync with another order of adding.

Equal bits then rest on the matrix unit: an element of a product of 16 terms must depend on its own
row and column alone, not on the shape of the instruction or on which operand is called left. The
gpu tests compare bits at numbers of rows on both sides of every change of shape.

Shapes   x [M, K], w [N, K]  ->  y [M, N]
Dtypes   x and w fp32, bf16 or fp16, the same; sums fp32, from fp32 products too (no tf32); y like x
Cost     reads x and w and writes y once, 2 * M * N * K flops
Source   He et al. 2025, "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab
Used by  fastsafe.engine (strict mode)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# In 16 bits 64 fills a line of 128 bytes and is four steps of the matrix unit. fp32 products run on
# the ordinary cores, which hold a whole block of k in registers.
BLOCK_K = {2: 64, 4: 16}  # by bytes of an element; nothing else may choose it
GROUP = 8  # row tiles that share weight tiles in L2
STAGES = {16: 8, 64: 6, 128: 4}  # by rows: at most 96 KiB, so that a processor holds two programs
FULL = 128  # programs that fill a GPU; an H200 has 132 processors


class TileShape(NamedTuple):
    """What one program computes: rows of x times rows of w."""

    rows: int
    outputs: int
    swap: bool
    num_warps: int
    num_stages: int


def tile(M: int, N: int, itemsize: int) -> TileShape:
    """Choose the tile for ``M`` rows and ``N`` outputs. BLOCK_K is no part of it."""
    if itemsize == 4:
        return TileShape(16, 64, False, 4, 3) if M <= 64 else TileShape(64, 64, False, 4, 3)
    if M > 128 and triton.cdiv(M, 128) * triton.cdiv(N, 256) >= FULL:
        return TileShape(128, 256, False, 8, 3)
    rows = 16 if M <= 16 else 64 if M <= 64 else 128
    return TileShape(rows, 64, True, 4, STAGES[rows])


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Define the op in plain torch, in the dtype of ``x``."""
    return x @ weight.T


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_stride,
    w_stride,
    M,
    N,
    K,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
):
    # programs that run together share GROUP row tiles and few weight tiles
    per_group = GROUP * tl.cdiv(N, OUTPUTS)
    first = tl.program_id(0) // per_group * GROUP
    height = tl.minimum(tl.cdiv(M, ROWS) - first, GROUP)
    local = tl.program_id(0) % per_group
    # int64: M * N passes 2**31 at 17k rows of a 128k vocabulary
    m = (first + local % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = (local // height).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, BLOCK_K)
    # past the end the last row is read again: it is not stored, and the loop needs no mask
    x_ptrs = x_ptr + tl.minimum(m, M - 1)[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + tl.minimum(n, N - 1)[:, None] * w_stride + k[None, :]
    sums = tl.zeros((OUTPUTS if SWAP else ROWS, ROWS if SWAP else OUTPUTS), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            keep = (start + k < K)[None, :]
            x = tl.load(x_ptrs + start, mask=keep, other=0.0)
            w = tl.load(w_ptrs + start, mask=keep, other=0.0)
        if SWAP:
            sums = tl.dot(w, x.T, sums, input_precision="ieee")
        else:
            sums = tl.dot(x, w.T, sums, input_precision="ieee")
    if SWAP:
        sums = sums.T
    keep = (m < M)[:, None] & (n < N)[None, :]
    y_ptrs = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=keep)


def matmul_invariant(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``x`` by the transpose of ``weight``, each row the same bits in any batch.

    Args:
        x: [M, K] fp32, bf16 or fp16, contiguous in K; rows may be any distance apart.
        weight: [N, K] of the same dtype, contiguous in K; rows may be any distance apart.

    Returns:
        [M, N] in the dtype of ``x``, summed in fp32 and rounded once. Not differentiable. The bits
        of a row are the same for every M and every place in it, on one GPU model and one version
        of Triton; the CPU reference does not promise that.

    Raises:
        ValueError: Shapes or devices disagree, or one of the two is strided in K.
        TypeError: A dtype is not listed above, or the two differ.

    Example:
        >>> matmul_invariant(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        tensor([[1., 3., 5.],
                [2., 4., 6.]])
    """
    size = match("matmul_invariant", x=(x, "M K", FLOATS), weight=(weight, "N K", (x.dtype,)))
    M, N, K = size["M"], size["N"], size["K"]
    for name, t in (("x", x), ("weight", weight)):
        if t.stride(1) != 1 and K > 1:
            stride = f"stride {t.stride(1)} in K, expected 1"
            raise ValueError(f"matmul_invariant: {name} has {stride}; call .contiguous()")
    if runs_reference(x):
        return reference(x, weight)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M and N:
        way = tile(M, N, x.itemsize)
        grid = (triton.cdiv(M, way.rows) * triton.cdiv(N, way.outputs),)
        block_k = BLOCK_K[x.itemsize]
        _matmul_kernel[grid](
            x,
            weight,
            y,
            x.stride(0),
            weight.stride(0),
            M,
            N,
            K,
            EVEN=K % block_k == 0,
            ROWS=way.rows,
            OUTPUTS=way.outputs,
            BLOCK_K=block_k,
            GROUP=GROUP,
            SWAP=way.swap,
            num_warps=way.num_warps,
            num_stages=way.num_stages,
        )
    return y


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random values, growing along K so that a wrong end of the sum is seen."""
    M, N, K = dims["M"], dims["N"], dims["K"]
    x = torch.randn(M, K, device=device) * torch.linspace(0.5, 1.5, K, device=device)
    return x.to(dtype), (torch.randn(N, K, device=device) / 64).to(dtype)


KERNEL = Kernel(
    fn=matmul_invariant,
    reference=reference,
    make=_make,
    tests=(
        {"M": 1, "N": 3, "K": 5},
        {"M": 17, "N": 67, "K": 128},
        {"M": 131, "N": 131, "K": 71},
    ),
    bench=(
        *({"M": M, "N": 28_672, "K": 4096} for M in (1, 16, 64, 256, 1024)),
        *({"M": M, "N": 4096, "K": 14_336} for M in (1, 64, 256, 1024)),
        *({"M": M, "N": 6144, "K": 4096} for M in (16, 1024)),
    ),
    min_bytes=lambda d, dtype: (
        dtype.itemsize * (d["M"] * d["K"] + d["N"] * d["K"] + d["M"] * d["N"])
    ),
    flops=lambda d: 2 * d["M"] * d["N"] * d["K"],
    wgmma=("_matmul_kernel",),
)
