"""Causal self-attention over packed sequences, without a cache.

For training, scoring and prefill. A sequence is padded to a length that follows from its own
length alone, so its bits do not depend on which sequences lie beside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe.model.layers import softcap as squash

PAD_TO = 16  # padded lengths are multiples of this many tokens


class _Bucket(NamedTuple):
    """Sequences of one padded length, contiguous in the padded order."""

    begin: int
    end: int
    length: int  # padded


class PackedAttention:
    """Attends within each of several sequences that lie end to end in one batch of rows.

    Implements ``Attend`` of the transformer; differentiable in q, k and v.

    Args:
        lengths: Number of tokens of each sequence, in the order of the rows; all positive.

    Raises:
        ValueError: A length is not positive.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        if any(n < 1 for n in self.lengths):
            raise ValueError(
                f"PackedAttention: lengths has {min(self.lengths)}, expected positive lengths; "
                "leave empty sequences out"
            )
        self._buckets, rows, slots = _plan(self.lengths)
        # row that each padded slot holds; slots past a sequence's end hold its last row, whose
        # values are finite and whose results nobody reads
        self._rows = None if rows is None else torch.tensor(rows)
        self._slots = None if slots is None else torch.tensor(slots)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend causally within each sequence.

        Args:
            layer: Not used: nothing is cached.
            q: [N, H, D], N the sum of the lengths.
            k: [N, Hkv, D].
            v: [N, Hkv, D].
            scale: Multiplies q k^T.
            window: Number of keys that a query sees, itself included; None = all before it.
            softcap: Bound of the scaled scores; None = none.

        Returns:
            [N, H, D].
        """
        if self._rows is not None and self._slots is not None:
            if self._rows.device != q.device:
                self._rows, self._slots = self._rows.to(q.device), self._slots.to(q.device)
            q, k, v = (x.index_select(0, self._rows) for x in (q, k, v))
        outs = [self._attend(bucket, q, k, v, scale, window, softcap) for bucket in self._buckets]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if self._slots is None else out.index_select(0, self._slots)

    def _attend(
        self,
        bucket: _Bucket,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        n = bucket.length
        q, k, v = (
            x[bucket.begin : bucket.end].view(-1, n, x.shape[1], x.shape[2]).transpose(1, 2)
            for x in (q, k, v)
        )
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
        scores = squash(torch.matmul(grouped, k.unsqueeze(2).transpose(3, 4)) * scale, cap)
        scores = scores + self._mask(T, window, q)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v.unsqueeze(2)).view(B, H, T, D)

    def _mask(self, length: int, window: int | None, like: Tensor) -> Tensor:
        """Additive causal mask [T, T] in the dtype of ``like``, made once."""
        mask = self._masks.get((length, window))
        if mask is None:
            ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
            hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
            mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill_(hidden, -torch.inf)
            self._masks[length, window] = mask
        return mask


def _plan(
    lengths: tuple[int, ...],
) -> tuple[list[_Bucket], list[int] | None, list[int] | None]:
    """Order sequences by padded length.

    Returns:
        The buckets; the row that each padded slot holds; the padded slot of each row. No index
        where the rows lie as one bucket wants them.
    """
    padded = [-(-n // PAD_TO) * PAD_TO for n in lengths]
    if padded == list(lengths) and len(set(padded)) <= 1:
        return [_Bucket(0, sum(padded), n) for n in padded[:1]], None, None
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    buckets: list[_Bucket] = []
    rows: list[int] = []
    slots = [0] * starts[-1]
    for size in sorted(set(padded)):
        begin = len(rows)
        for i, n in enumerate(lengths):
            if padded[i] == size:
                start, slot = starts[i], len(rows)
                slots[start : start + n] = range(slot, slot + n)
                rows += range(start, start + n)
                rows += [start + n - 1] * (size - n)
        buckets.append(_Bucket(begin, len(rows), size))
    return buckets, rows, slots
