"""Choose one token per row from logits, independent of the batch around it.

A draw is an argmax over filtered log-probabilities plus Gumbel noise (Gumbel 1954). The noise of a
token is a hash of (seed, position, token id), so that a row draws the same token alone, in any
batch, in any slot and after a resume.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsafe.engine.request import SamplingParams

_M32 = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """Scramble 32-bit values held in int64 (MurmurHash3's finalizer, Appleby 2011)."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _M32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _M32
    return h ^ (h >> 16)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise per row and token.

    Args:
        seeds: [M] int64, any value.
        positions: [M] int64, index of the token to be drawn in its sequence.
        vocab_size: V.

    Returns:
        [M, V] fp32, standard Gumbel; a function of (seed, position, token id) alone.
    """
    key = _mix((seeds & _M32) ^ 0x9E3779B9)
    key = _mix(key ^ ((seeds >> 32) & _M32))
    key = _mix(key ^ (positions & _M32))
    tokens = torch.arange(vocab_size, device=seeds.device)
    bits = _mix(key[:, None] ^ _mix(tokens * 0x9E3779B1 & _M32))
    # 23 bits, centred in their interval: exact in fp32, never 0 or 1, so the noise is finite
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


class RowParams(NamedTuple):
    """Sampling parameters of a batch as tensors."""

    seeds: Tensor  # [M] int64
    temperature: Tensor  # [M] fp32
    top_k: Tensor  # [M] int64
    top_p: Tensor  # [M] fp32
    min_p: Tensor  # [M] fp32
    is_sampled: Tensor  # [M] bool: temperature > 0
    any_sampled: bool
    any_filtered: bool

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], device: torch.device) -> "RowParams":
        """Tensors of the rows' parameters, in order."""
        temperature = torch.tensor([p.temperature for p in params], device=device)
        filtered = any(p.top_k or p.top_p < 1 or p.min_p for p in params if p.temperature > 0)
        signed = [(p.seed + (1 << 63)) % (1 << 64) - (1 << 63) for p in params]
        return cls(
            torch.tensor(signed, dtype=torch.int64, device=device),
            temperature,
            torch.tensor([p.top_k for p in params], device=device),
            torch.tensor([p.top_p for p in params], device=device),
            torch.tensor([p.min_p for p in params], device=device),
            temperature > 0,
            any(p.temperature > 0 for p in params),
            filtered,
        )

    def take(self, index: Tensor) -> "RowParams":
        """Parameters of the rows ``index``."""
        return self._replace(
            seeds=self.seeds[index],
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            min_p=self.min_p[index],
            is_sampled=self.is_sampled[index],
        )


def sample(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [M, V] fp32, not modified.
        params: Parameters of the M rows.
        positions: [M] int64, index in its sequence of the token to be drawn.

    Returns:
        [M] int64. A row without a finite logit gives an arbitrary token: check before.
    """
    greedy = logits.argmax(-1)
    if not params.any_sampled:
        return greedy
    rows = params.is_sampled.nonzero()[:, 0]
    chosen = params.take(rows)
    scaled = logits[rows] / chosen.temperature[:, None]
    if params.any_filtered:
        scaled = _filter(scaled, chosen)
    noise = gumbel(chosen.seeds, positions[rows], logits.shape[1])
    greedy[rows] = (scaled + noise).argmax(-1)
    return greedy


def _filter(logits: Tensor, params: RowParams) -> Tensor:
    """Set the logits of dropped tokens to -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    drop = (params.top_k[:, None] > 0) & (rank >= params.top_k[:, None])
    probs = ordered.masked_fill(drop, -float("inf")).softmax(-1)
    # a token is dropped when those before it hold top_p already; the first one stays
    drop |= (probs.cumsum(-1) - probs >= params.top_p[:, None]) & (params.top_p[:, None] < 1)
    drop |= probs < params.min_p[:, None] * probs[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(drop.gather(-1, order.argsort(-1)), -float("inf"))
