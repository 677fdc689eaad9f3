"""Weights to 4-bit NormalFloat codes with one absmax per 64 weights.

    a[o, b] = max |W[o, i]|  over block b, i // 64 = b
    c[o, i] = the k whose q[k] is nearest to W[o, i] / a[o, i // 64]
            = number of k in 0..14 with W[o, i] > a[o, i // 64] * (q[k] + q[k + 1]) / 2

A weight that lies on a midpoint takes the lower code, as in bitsandbytes. A block of zeros gets
a = 0 and the code of 0. Values q and the order of two codes in a byte: see nf4.

Shapes   W [O, I]  ->  c [O, I / 2] (packed), a [O, I / 64];  I is a multiple of 64
Dtypes   W fp32, bf16 or fp16; c uint8; a and the midpoints fp32
Cost     reads W once and writes 4.5 bits per weight
Source   Dettmers et al. 2023, arXiv:2305.14314
Used by  fastsafe.train (loading a base for QLoRA)
"""

from itertools import pairwise

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton
from .nf4_dequantize import BLOCK, CODES

MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(CODES))
ZERO = CODES.index(0.0)

# 32 blocks are 16 weights for each of 128 threads.
BLOCKS = 32
WARPS = 4

_MIDPOINTS = tl.constexpr(MIDPOINTS)
_ZERO = tl.constexpr(ZERO)


def reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Define the op in plain torch, in fp32 or in the dtype of ``weight`` if that is wider."""
    O, I = weight.shape
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).view(O, I // BLOCK, BLOCK)
    absmax = w.abs().amax(-1)
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    for midpoint in MIDPOINTS:
        codes += w > absmax[..., None] * midpoint
    codes[absmax == 0] = ZERO
    halves = codes.view(O, I // 2, 2)
    return halves[..., 0] << 4 | halves[..., 1], absmax


@triton.jit(do_not_specialize=["n_blocks"])
def _quantize_kernel(w_ptr, c_ptr, a_ptr, n_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    HALF: tl.constexpr = BLOCK // 2
    # int64: large embeddings pass 2**31 weights
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    keep = (block < n_blocks)[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + at, mask=keep, other=0.0).to(tl.float32)
    a = tl.max(tl.abs(w), 1)
    # midpoints are scaled once per block, so no weight is divided
    codes = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        codes = tl.where(w > (a * _MIDPOINTS[i])[:, None], i + 1, codes)
    codes = tl.where((a == 0.0)[:, None], _ZERO, codes)
    high, low = tl.split(tl.reshape(codes, (BLOCKS, HALF, 2)))
    at_byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(c_ptr + at_byte, (high * 16 + low).to(tl.uint8), mask=keep)
    tl.store(a_ptr + block, a, mask=block < n_blocks)


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest NF4 codes of ``weight``, and the absmax of each block of 64.

    Args:
        weight: [O, I] fp32, bf16 or fp16, contiguous, I a multiple of 64. Not modified. That it is
            finite is not checked: on a GPU that would cost a synchronisation.

    Returns:
        Codes [O, I / 2] uint8, the first of two weights in the high half of a byte, and absmax
        [O, I / 64] fp32: what `nf4_dequantize` takes. Not differentiable.

    Raises:
        ValueError: I is no multiple of 64, or ``weight`` is not contiguous.
        TypeError: The dtype is not listed above.

    Example:
        >>> codes, absmax = nf4_quantize(torch.linspace(-2, 2, 64)[None])
        >>> hex(codes[0, 0]), hex(codes[0, -1]), absmax.tolist()
        ('0x0', '0xff', [[2.0]])
    """
    size = match("nf4_quantize", weight=(weight, "O I", FLOATS))
    O, I = size["O"], size["I"]
    if I % BLOCK:
        raise ValueError(f"nf4_quantize: weight is {[O, I]}, expected I to be a multiple of 64")
    if not weight.is_contiguous():
        strides = f"strides {list(weight.stride())}, expected contiguous"
        raise ValueError(f"nf4_quantize: weight has {strides}; call .contiguous()")
    if runs_reference(weight):
        return reference(weight)
    codes = torch.empty(O, I // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(O, I // BLOCK, dtype=torch.float32, device=weight.device)
    n_blocks = absmax.numel()
    if n_blocks:
        grid = (triton.cdiv(n_blocks, BLOCKS),)
        _quantize_kernel[grid](
            weight, codes, absmax, n_blocks, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS
        )
    return codes, absmax


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Normal weights of growing size, a block of zeros, one of a single value, one of -0."""
    O, I = dims["O"], dims["I"]
    w = torch.randn(O, I, device=device) * torch.linspace(0.01, 1, I, device=device)
    w[0, :BLOCK] = 0.0
    w[0, BLOCK : 2 * BLOCK] = -0.0
    w[-1, -BLOCK:] = -0.25
    return (w.to(dtype),)


KERNEL = Kernel(
    fn=nf4_quantize,
    reference=reference,
    make=_make,
    tests=({"O": 1, "I": 64}, {"O": 7, "I": 192}, {"O": 3, "I": 64 * (BLOCKS + 1)}),
    bench=({"O": 14_336, "I": 4096}, {"O": 4096, "I": 4096}),
    min_bytes=lambda d, dtype: d["O"] * d["I"] // BLOCK * (BLOCK // 2 + 4 + BLOCK * dtype.itemsize),
)
