"""Rotate queries and keys of a fused projection and write keys and values to the cache.

    q, k, v = qkv[n]                             H, Hkv and Hkv heads of D features
    result[n] = rope(q)                          with q_norm if there is one
    k_pages[slot // S, :, slot % S] = rope(k)    with k_norm if there is one
    v_pages[slot // S, :, slot % S] = v          slot = slots[n]; -1 writes nothing

Tiles and arithmetic are those of ``rope``: keys in the cache have the bits that it returns.

Shapes   qkv [N, (H + 2 Hkv) D], cos, sin [N, R], pages [P, Hkv, S, D], slots [N]  ->  [N, H, D]
Dtypes   qkv fp32, bf16 or fp16, pages and norm weights like it; cos, sin fp32 or like it; slots
         int64; arithmetic fp32, rounded once
Cost     reads qkv and writes queries, keys and values, each once
Source   Su et al. 2021, arXiv:2104.09864; Kwon et al. 2023, arXiv:2309.06180 (pages)
Used by  fastsafe.engine (prefill and decode)
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton
from .rms_norm import refuse_strides
from .rope import (
    inverse_rms,
    load_angle,
    load_norm_weight,
    load_parts,
    make_tables,
    refuse_width,
    rotate,
    store_parts,
    tiles,
)
from .rope import reference as rope_reference


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
) -> Tensor:
    """Define the op in plain torch: rope, then an unfused write."""
    kv_heads, page_size, D = k_pages.shape[1:]
    heads = qkv.unflatten(1, (-1, D))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    written = slots >= 0
    page, offset = slots[written] // page_size, slots[written] % page_size
    k_pages[page, :, offset] = rope_reference(k, cos, sin, k_norm, eps, one_plus)[written]
    v_pages[page, :, offset] = v[written]
    return rope_reference(q, cos, sin, q_norm, eps, one_plus)


@triton.jit
def _write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_stride,
    cos_stride,
    sin_stride,
    k_page_stride,
    k_head_stride,
    k_slot_stride,
    v_page_stride,
    v_head_stride,
    v_slot_stride,
    H,
    HKV,
    eps,
    NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    # a tile may hold heads of all three kinds; each store below masks the others
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    first, second, rest = load_parts(
        qkv_ptr + n * qkv_stride + h * D, h < H + 2 * HKV, HALF, D, I, J
    )
    z_first, z_second, z_rest = first, second, rest
    if NORM:
        q_first, q_second, q_rest = load_norm_weight(q_norm_ptr, ONE_PLUS, HALF, D, I, J)
        k_first, k_second, k_rest = load_norm_weight(k_norm_ptr, ONE_PLUS, HALF, D, I, J)
        r = inverse_rms(first, second, rest, eps, D)
        z_first = first * r * tl.where(h < H, q_first, k_first)
        z_second = second * r * tl.where(h < H, q_second, k_second)
        z_rest = rest * r * tl.where(h < H, q_rest, k_rest)
    c = load_angle(cos_ptr + n * cos_stride, HALF, I)
    s = load_angle(sin_ptr + n * sin_stride, HALF, I)
    z_first, z_second = rotate(z_first, z_second, c, s)
    store_parts(q_ptr + (n * H + h) * D, z_first, z_second, z_rest, h < H, HALF, D)
    slot = tl.load(slots_ptr + n)
    page, offset = slot // S, slot % S
    k_row = k_ptr + page * k_page_stride + offset * k_slot_stride + (h - H) * k_head_stride
    is_k = (h >= H) & (h < H + HKV) & (slot >= 0)
    store_parts(k_row, z_first, z_second, z_rest, is_k, HALF, D)
    v_row = v_ptr + page * v_page_stride + offset * v_slot_stride
    is_v = (h >= H + HKV) & (h < H + 2 * HKV) & (slot >= 0)
    store_parts(v_row + (h - H - HKV) * v_head_stride, first, second, rest, is_v, HALF, D)


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    one_plus: bool = False,
) -> Tensor:
    """Rotate queries and keys of ``qkv``; write keys and values to their pages.

    Args:
        qkv: [N, (H + 2 Hkv) * D] fp32, bf16 or fp16, contiguous in a row: query heads, key
            heads, value heads. Not modified.
        cos: [N, R] fp32 or the dtype of ``qkv``, as ``rope`` takes it.
        sin: [N, R] like ``cos``.
        k_pages: [P, Hkv, S, D] in the dtype of ``qkv``, contiguous in D. Row n is written at
            page slots[n] // S, offset slots[n] % S; nothing else is touched.
        v_pages: [P, Hkv, S, D] like ``k_pages``.
        slots: [N] int64 in [0, P * S), or -1 for a row that is not written. Neither the range
            nor that no slot comes twice is checked: on a GPU that would cost a synchronisation.
        q_norm: [D] contiguous, dtype of ``qkv``: weight of the norm of every query head; None
            for no norm.
        k_norm: [D] like ``q_norm``, of the key heads; both are given or neither.
        eps: Added to the mean square.
        one_plus: Multiply by 1 + weight instead, in fp32 as Gemma does.

    Returns:
        The rotated queries, [N, H, D] contiguous, dtype of ``qkv``. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, a last dimension is strided, or one of the norm
            weights is missing.
        TypeError: A dtype is not listed above.

    Example:
        >>> k_pages, v_pages = torch.zeros(2, 1, 1, 1, 2)
        >>> tables = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])  # a quarter turn
        >>> qkv = torch.tensor([[3.0, 4.0, 1.0, 2.0, 5.0, 6.0]])
        >>> rope_kv_write(qkv, *tables, k_pages, v_pages, torch.tensor([0]))
        tensor([[[-4.,  3.]]])
        >>> k_pages.flatten().tolist(), v_pages.flatten().tolist()
        ([-2.0, 1.0], [5.0, 6.0])
    """
    op, same = "rope_kv_write", (qkv.dtype,)
    tables = tuple(dict.fromkeys((qkv.dtype, torch.float32)))
    args = {"qkv": (qkv, "N C", FLOATS), "cos": (cos, "N R", tables), "sin": (sin, "N R", tables)}
    args["k_pages"] = (k_pages, "P Hkv S D", same)
    args["v_pages"] = (v_pages, "P Hkv S D", same)
    args["slots"] = (slots, "N", (torch.int64,))
    if (q_norm is None) != (k_norm is None):
        missing, given = ("q_norm", "k_norm") if q_norm is None else ("k_norm", "q_norm")
        raise ValueError(f"{op}: {missing} is None, expected [D] like {given}; give both or none")
    if q_norm is not None and k_norm is not None:
        args |= {"q_norm": (q_norm, "D", same), "k_norm": (k_norm, "D", same)}
    size = match(op, **args)
    N, D, kv_heads = size["N"], size["D"], size["Hkv"]
    heads, left = divmod(qkv.shape[1], D)
    if left or heads <= 2 * kv_heads:
        with_pages = f"with Hkv={kv_heads}, D={D} from k_pages"
        raise ValueError(f"{op}: qkv is {list(qkv.shape)}, expected [N, (H+2*Hkv)*D] {with_pages}")
    refuse_width(op, cos, D)
    refuse_strides(op, args)
    if runs_reference(qkv):
        with torch.no_grad():
            return reference(qkv, cos, sin, k_pages, v_pages, slots, q_norm, k_norm, eps, one_plus)
    q = torch.empty(N, heads - 2 * kv_heads, D, dtype=qkv.dtype, device=qkv.device)
    shape = tiles(cos.shape[1], D)
    if N:
        _write_kernel[(N, triton.cdiv(heads, shape["HEADS"]))](
            qkv, cos, sin, slots, qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm, q, k_pages, v_pages,
            qkv.stride(0), cos.stride(0), sin.stride(0),
            k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
            v_pages.stride(0), v_pages.stride(1), v_pages.stride(2),
            heads - 2 * kv_heads, kv_heads, eps,
            NORM=q_norm is not None, ONE_PLUS=one_plus, S=size["S"], **shape,
        )  # fmt: skip
    return q


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Distinct slots in no order, one row that is not written, tables in fp32."""
    N, D, P, S = dims["N"], dims["D"], dims["P"], dims["S"]
    one_plus = bool(dims["one_plus"])
    qkv = torch.randn(N, (dims["H"] + 2 * dims["Hkv"]) * D, device=device).to(dtype)
    pages = [torch.randn(P, dims["Hkv"], S, D, device=device).to(dtype) for _ in "kv"]
    slots = torch.randperm(P * S, device=device)[:N]
    slots[N // 2 : N // 2 + (N > 1)] = -1
    w = 0.3 * torch.randn(2, D, device=device) + (0 if one_plus else 1)
    norms = w.to(dtype).unbind() if dims["norm"] else (None, None)
    return qkv, *make_tables(N, dims["R"], device), *pages, slots, *norms, 0.05, one_plus


def _point(
    N: int, H: int, Hkv: int, D: int, P: int, S: int, R: int = 0, norm: int = 0, one_plus: int = 0
) -> Dims:
    shape = {"N": N, "H": H, "Hkv": Hkv, "D": D, "P": P, "S": S}
    return shape | {"R": R or D, "norm": norm, "one_plus": one_plus}


def _min_bytes(dims: Dims, dtype: torch.dtype) -> int:
    """Read and write every head once; read half of cos and of sin, and the slots."""
    values = 2 * (dims["H"] + 2 * dims["Hkv"]) * dims["D"]
    return dims["N"] * (values * dtype.itemsize + dims["R"] * 4 + 8)


KERNEL = Kernel(
    fn=rope_kv_write,
    reference=reference,
    make=_make,
    tests=(
        _point(1, 1, 1, 2, P=1, S=1),
        _point(5, 3, 1, 80, P=3, S=4, R=32),
        _point(3, 5, 2, 48, P=2, S=16, R=20, norm=1, one_plus=1),
        _point(7, 14, 2, 128, P=2, S=16, norm=1),
    ),
    bench=(
        _point(1024, 32, 8, 128, P=4096, S=64),
        _point(16_384, 32, 8, 128, P=4096, S=64),
        _point(1024, 32, 8, 128, P=4096, S=64, norm=1),
        _point(1024, 8, 4, 256, P=4096, S=64, norm=1, one_plus=1),
    ),
    min_bytes=_min_bytes,
    mutates=(3, 4),
)
