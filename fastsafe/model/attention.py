"""Causal self-attention over packed sequences, without a cache.

For training, scoring and prefill. Where a sequence is padded, it is to a length that follows from
its own length alone, so its bits do not depend on which sequences lie beside it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsafe.model import cpu_ops
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.layers import softcap as squash
from fastsafe_kernels import choose_backend, varlen_attention

# what FlashAttention takes; fp32, and a softcap that it lacks, are computed in plain torch
_FLASH = (torch.bfloat16, torch.float16)

# padded lengths are multiples of this many tokens: 8 and 32 were slower on short sequences
PAD_TO = 16


class _Bucket(NamedTuple):
    """Sequences of one padded length, contiguous in the padded order."""

    slots: int  # padded rows of all its sequences
    length: int  # padded, of each


class _Padding(NamedTuple):
    """How packed rows and padded slots correspond."""

    rows: Tensor  # [slots], row that each slot holds; past a sequence's end, its last row
    slots: Tensor  # [N], slot of each row
    pads: Tensor  # slots past a sequence's end; nobody reads their results


class PackedAttention:
    """Attends within each of several sequences that lie end to end in one batch of rows.

    Implements ``Attend`` of the transformer; differentiable in q, k and v.

    Args:
        lengths: Number of tokens of each sequence, in the order of the rows; at least one
            sequence, and all positive.

    Raises:
        ValueError: There is no length, or one is not positive.

    Example:
        >>> attend = PackedAttention([2, 3])
        >>> x = torch.ones(5, 1, 4)
        >>> attend(0, x, x, x, AttentionFlags(0.5, None, None)).shape
        torch.Size([5, 1, 4])
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        if min(self.lengths, default=0) < 1:
            raise ValueError(
                f"PackedAttention: lengths is {list(self.lengths)[:8]}, expected positive numbers; "
                "leave empty sequences out"
            )
        self._starts = torch.tensor((0, *accumulate(self.lengths)))
        self._device_starts: Tensor | None = None  # int32, of the last GPU asked for
        self._plan: tuple[list[_Bucket], _Padding | None] | None = None  # made when needed
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        """Attend causally within each sequence.

        Args:
            layer: Not used: nothing is cached.
            q: [N, H, D], N the sum of the lengths.
            k: [N, Hkv, D].
            v: [N, Hkv, D].
            flags: Scale, window and bound of the scores.

        Returns:
            [N, H, D].
        """
        if cpu_ops.runs_natively(q):
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                attended: Tensor = _Attention.apply(q, k, v, self._starts, flags)  # type: ignore[no-untyped-call]
                return attended
            return cpu_ops.attention(q, k, v, self._starts, flags)[0]
        if _takes_flash(q, flags.softcap):
            if self._device_starts is None or self._device_starts.device != q.device:
                self._device_starts = self._starts.to(q.device, torch.int32)
            longest = max(self.lengths)
            return varlen_attention(q, k, v, self._device_starts, longest, *flags)
        buckets, padding = self._plan or _plan(self.lengths)
        if padding is not None and padding.rows.device != q.device:
            padding = _Padding(*(x.to(q.device) for x in padding))
        self._plan = buckets, padding
        if padding is not None:
            q, k, v = (
                _Copy.apply(x, padding.rows, padding.slots, None)  # type: ignore[no-untyped-call]
                for x in (q, k, v)
            )
        # split, not sliced: its backward pass is one concatenation
        sizes = [bucket.slots for bucket in buckets]
        qs, ks, vs = (x.split_with_sizes(sizes) for x in (q, k, v))
        outs = [
            self._attend(bucket.length, qs[i], ks[i], vs[i], flags)
            for i, bucket in enumerate(buckets)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        if padding is None:
            return out
        unpadded: Tensor = _Copy.apply(out, padding.slots, padding.rows, padding.pads)  # type: ignore[no-untyped-call]
        return unpadded

    def _attend(self, n: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags) -> Tensor:
        """Attend within sequences of ``n`` padded tokens that lie end to end."""
        q, k, v = (x.view(-1, n, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v))
        scale, window, softcap = flags
        if window is not None and window >= n:
            window = None
        if softcap is not None:
            out = self._capped(q, k, v, scale, window, softcap)
        else:
            mask = None if window is None else self._mask(n, window, q)
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        return out.transpose(1, 2).reshape(-1, q.shape[1], q.shape[3])

    def _capped(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float
    ) -> Tensor:
        """Attention with the scores squashed, which no fused kernel does: q [B, H, T, D]."""
        B, H, T, D = q.shape
        grouped = q.reshape(B, k.shape[1], -1, T, D)
        products = torch.matmul(grouped, k.unsqueeze(2).transpose(3, 4))
        products = products.to(torch.promote_types(q.dtype, torch.float32))
        scores = squash(products * scale, cap) + self._mask(T, window, products)
        weights = torch.softmax(scores, -1).to(v.dtype)
        return torch.matmul(weights, v.unsqueeze(2)).view(B, H, T, D)

    def _mask(self, length: int, window: int | None, like: Tensor) -> Tensor:
        """Additive causal mask [T, T] in the dtype of ``like``, made once."""
        mask = self._masks.get((length, window))
        if mask is None or mask.dtype != like.dtype:
            ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
            hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
            mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            mask = self._masks[length, window] = mask.masked_fill_(hidden, -torch.inf)
        return mask


def _takes_flash(q: Tensor, softcap: float | None) -> bool:
    if not q.is_cuda or q.dtype not in _FLASH:
        return False
    return softcap is None or choose_backend().supports_softcap


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, flags: AttentionFlags
    ) -> Tensor:
        out, scales = cpu_ops.attention(q, k, v, starts, flags)
        ctx.save_for_backward(scales, q, k, v)
        ctx.starts, ctx.flags = starts, flags
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scales, q, k, v = ctx.saved_tensors
        gradients = cpu_ops.attention_backward(grads[0], scales, q, k, v, ctx.starts, ctx.flags)
        return *gradients, None, None


class _Copy(torch.autograd.Function):
    """Copy the rows ``index``; the derivative copies back, where autograd would scatter.

    It copies the rows ``back``, and is zero at ``pads``: no real query sees a pad, and its result
    is not read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, pads: Tensor | None) -> Tensor:
        ctx.back, ctx.pads = back, pads
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grads[0].index_select(0, ctx.back)
        if ctx.pads is not None:
            gradient.index_fill_(0, ctx.pads, 0.0)
        return gradient, None, None, None


def _plan(lengths: tuple[int, ...]) -> tuple[list[_Bucket], _Padding | None]:
    """Order sequences by padded length; no padding where the rows are one bucket as they lie."""
    padded = [-(-n // PAD_TO) * PAD_TO for n in lengths]
    if padded == list(lengths) and len(set(padded)) <= 1:
        return [_Bucket(sum(padded), n) for n in padded[:1]], None
    starts = [0, *accumulate(lengths)]
    buckets: list[_Bucket] = []
    rows: list[int] = []
    pads: list[int] = []
    slots = [0] * starts[-1]
    for size in sorted(set(padded)):
        begin = len(rows)
        for i, n in enumerate(lengths):
            if padded[i] == size:
                start, slot = starts[i], len(rows)
                slots[start : start + n] = range(slot, slot + n)
                pads += range(slot + n, slot + size)
                # the last row again: finite values, which autograd then multiplies by zero
                rows += [*range(start, start + n), *[start + n - 1] * (size - n)]
        buckets.append(_Bucket(len(rows) - begin, size))
    int64 = torch.int64
    return buckets, _Padding(*(torch.tensor(x, dtype=int64) for x in (rows, slots, pads)))
