"""Weights from 4-bit NormalFloat codes, and absmax in 8 bits.

    W[o, i] = q[c[o, i]] * a[o, i // 64]

q holds the 16 values of NF4: quantiles of N(0, 1) scaled to [-1, 1], one of them exactly 0. Seven
are negative and eight positive, so q is not symmetric. c[o, i] is half a byte; byte j of a row
holds i = 2j in its high half and i = 2j + 1 in its low half, as bitsandbytes packs them.

Double quantization keeps a itself in 8 bits, blocks of 256 over all of it in row order:

    a[n] = mean(a) + s[n // 256] * k[n] / 127,     s[m] = max |a - mean(a)| over block m

Shapes   c [O, I / 2] (packed), a [O, I / 64]  ->  W [O, I];  I is a multiple of 64
Dtypes   c uint8; a fp32; k int8; the product fp32; W fp32, bf16 or fp16
Cost     reads 4.5 bits per weight and writes W once
Source   Dettmers et al. 2023, arXiv:2305.14314, appendix E (its 8-bit codes of a are floats; equal
         steps have a smaller largest error)
Used by  fastsafe.train (frozen base weights of QLoRA)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64  # weights that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one scale

# 64 blocks are 16 bytes of codes for each of 128 threads, one load of 128 bits.
BLOCKS = 64
WARPS = 4

_CODES = tl.constexpr(CODES)


class QuantizedAbsmax(NamedTuple):
    """Absmax of NF4 blocks in 8 bits: the second quantization of QLoRA."""

    codes: Tensor  # like the absmax, int8 in [-127, 127]
    scales: Tensor  # [ceil(numel / 256)] fp32, at least 0
    mean: Tensor  # [] fp32


def reference(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Define the op in plain torch: look up, scale in the dtype of ``absmax``, round."""
    values = torch.tensor(CODES, dtype=absmax.dtype, device=codes.device)
    halves = torch.stack((codes >> 4, codes & 15), -1).long()
    blocks = values[halves].view(*absmax.shape, BLOCK)
    return (blocks * absmax[..., None]).to(dtype).flatten(1)


@triton.jit(do_not_specialize=["n_blocks"])
def _dequantize_kernel(c_ptr, a_ptr, w_ptr, n_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    # a lookup in registers: 15 selects per weight would cost more than the memory does
    entry = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(entry == i, _CODES[i], table)
    HALF: tl.constexpr = BLOCK // 2
    # int64: large embeddings pass 2**31 weights
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    keep = (block < n_blocks)[:, None]
    c = tl.load(c_ptr + block[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=keep, other=0)
    a = tl.load(a_ptr + block, mask=block < n_blocks, other=0.0)
    flat = tl.reshape(tl.join(c >> 4, c & 15), (BLOCKS * BLOCK,)).to(tl.int32)
    q = tl.reshape(tl.gather(table, flat, 0), (BLOCKS, BLOCK))
    w = (q * a[:, None]).to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], w, mask=keep)


def nf4_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights of ``codes``, each scaled by the absmax of its block of 64.

    The bytes are those of bitsandbytes for a weight whose rows are whole blocks: there ``codes`` is
    [O * I / 2, 1] and ``absmax`` is [O * I / 64].

    Args:
        codes: [O, I / 2] uint8, contiguous; the first of two weights is the high half of a byte.
        absmax: [O, I / 64] fp32, contiguous; from double quantization by `dequantize_absmax`.
        dtype: Of the result: fp32, bf16 or fp16.

    Returns:
        [O, I] of ``dtype``: the product in fp32, rounded once. Not differentiable.

    Raises:
        ValueError: ``codes`` is not 32 bytes per entry of ``absmax``, devices disagree, or one of
            the two is not contiguous.
        TypeError: A dtype is not listed above.

    Example:
        >>> codes = torch.full((1, 32), 0xF7, dtype=torch.uint8)
        >>> nf4_dequantize(codes, torch.tensor([[2.0]]), torch.float32)[0, :4]
        tensor([2., 0., 2., 0.])
    """
    args = {"codes": (codes, "O bytes", (torch.uint8,))}
    size = match("nf4_dequantize", **args, absmax=(absmax, "O blocks", (torch.float32,)))
    if size["bytes"] * 2 != size["blocks"] * BLOCK:
        want = f"[{size['O']}, {size['blocks'] * BLOCK // 2}], 32 bytes per absmax"
        raise ValueError(f"nf4_dequantize: codes is {list(codes.shape)}, expected {want}")
    for name, t in (("codes", codes), ("absmax", absmax)):
        if not t.is_contiguous():
            strides = f"strides {list(t.stride())}, expected contiguous"
            raise ValueError(f"nf4_dequantize: {name} has {strides}; call .contiguous()")
    if dtype not in FLOATS:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"nf4_dequantize: dtype is {dtype}, expected {allowed}")
    if runs_reference(codes):
        return reference(codes, absmax, dtype)
    n_blocks = absmax.numel()
    weight = torch.empty(size["O"], 2 * size["bytes"], dtype=dtype, device=codes.device)
    if n_blocks:
        grid = (triton.cdiv(n_blocks, BLOCKS),)
        _dequantize_kernel[grid](
            codes, absmax, weight, n_blocks, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS
        )
    return weight


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """Absmax in 8 bits: the difference from the mean, in 127ths of the largest of its block.

    Args:
        absmax: fp32, contiguous, of any shape but empty; blocks of 256 run through its rows.

    Returns:
        Codes of the same shape, scales and mean: 8.125 bits per value instead of 32. A value comes
        back within scale / 254 of itself. A block whose values all equal the mean has scale 0.
    """
    mean = absmax.mean()
    flat = (absmax - mean).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    scales = blocks.abs().amax(1)
    divisor = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / divisor[:, None] * 127).round().to(torch.int8)
    return QuantizedAbsmax(codes.flatten()[: len(flat)].view_as(absmax), scales, mean)


def dequantize_absmax(quantized: QuantizedAbsmax) -> Tensor:
    """Absmax from 8 bits, of the shape of its codes, fp32."""
    codes, scales, mean = quantized
    each = scales.repeat_interleave(ABSMAX_BLOCK)[: codes.numel()].view(codes.shape)
    # rounding may not turn the smallest absmax of a block negative: its weights would change sign
    return (codes * (each / 127) + mean).clamp_min(0)


def _make(
    dims: Dims, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Any codes; absmax from tiny to large, and one block of zeros."""
    O, I = dims["O"], dims["I"]
    codes = torch.randint(0, 256, (O, I // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(O, I // BLOCK, device=device) * 0.1
    absmax[0, 0] = 0.0
    absmax[-1, -1] = 1.0
    return codes, absmax, dtype


KERNEL = Kernel(
    fn=nf4_dequantize,
    reference=reference,
    make=_make,
    tests=({"O": 1, "I": 64}, {"O": 7, "I": 192}, {"O": 3, "I": 64 * (BLOCKS + 1)}),
    bench=({"O": 14_336, "I": 4096}, {"O": 4096, "I": 4096}),
    min_bytes=lambda d, dtype: d["O"] * d["I"] // BLOCK * (BLOCK // 2 + 4 + BLOCK * dtype.itemsize),
)
