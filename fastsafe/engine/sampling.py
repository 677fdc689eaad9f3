"""Sampling parameters of a batch, as the op that draws its tokens takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe_kernels as ops
from fastsafe.engine.request import SamplingParams


class RowParams(NamedTuple):
    """Sampling parameters of a batch as tensors."""

    seeds: Tensor  # [M] int64
    temperature: Tensor  # [M] fp32
    top_k: Tensor  # [M] int64
    top_p: Tensor  # [M] fp32
    min_p: Tensor  # [M] fp32

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], device: torch.device) -> "RowParams":
        """Tensors of the rows' parameters, in order."""

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        signed = [(p.seed + (1 << 63)) % (1 << 64) - (1 << 63) for p in params]
        return cls(
            torch.tensor(signed, dtype=torch.int64, device=device),
            floats([p.temperature for p in params]),
            torch.tensor([p.top_k for p in params], device=device),
            floats([p.top_p for p in params]),
            floats([p.min_p for p in params]),
        )

    def take(self, index: Tensor) -> "RowParams":
        """Parameters of the rows ``index``."""
        return RowParams(*(each[index] for each in self))


def sample(
    logits: Tensor, params: RowParams, positions: Tensor, with_logprobs: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row; see ``fastsafe_kernels.sample``.

    Args:
        logits: [M, V] fp32, not modified.
        params: Parameters of the M rows.
        positions: [M] int64, index in its sequence of the token to be drawn.
        with_logprobs: Whether the log-probabilities are wanted.

    Returns:
        Token ids [M] int64, their untempered log-probabilities [M] fp32 in nats, and whether
        each row's logits are finite [M] bool.
    """
    p = params
    return ops.sample(
        logits, p.temperature, p.top_k, p.top_p, p.min_p, p.seeds, positions, with_logprobs
    )
