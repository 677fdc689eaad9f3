"""Sampling parameters of a batch as tensors, and the call of the sampling kernel."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe_kernels as ops
from fastsafe.engine.request import SamplingParams

# Logits overflow fp32 when divided by a lower temperature; the most likely token wins long before.
_LOWEST_TEMPERATURE = 1e-30


class RowParams(NamedTuple):
    """Sampling parameters of a batch as tensors."""

    seeds: Tensor  # [M] int64
    temperature: Tensor  # [M] fp32
    top_k: Tensor  # [M] int64
    top_p: Tensor  # [M] fp32
    min_p: Tensor  # [M] fp32
    stop_ids: Tensor  # [M, K] int64, tokens that end each row; -1 where it has fewer

    @classmethod
    def stack(
        cls,
        params: Sequence[SamplingParams],
        device: torch.device,
        stop_ids: Sequence[Collection[int]],
    ) -> "RowParams":
        """Stack the parameters of rows and the token ids that end each of them."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        signed = [(p.seed + (1 << 63)) % (1 << 64) - (1 << 63) for p in params]
        temperatures = [
            p.temperature if p.temperature >= _LOWEST_TEMPERATURE else 0.0 for p in params
        ]
        return cls(
            column(signed, torch.int64),
            column(temperatures),
            column([p.top_k for p in params], torch.int64),
            column([p.top_p for p in params]),
            column([p.min_p for p in params]),
            _padded(stop_ids, device),
        )

    def take(self, index: Tensor) -> "RowParams":
        """Return the parameters of the rows ``index``."""
        return RowParams(*(column[index] for column in self))


def _padded(rows: Sequence[Collection[int]], device: torch.device) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    padded = [[*sorted(row), *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)


def sample(
    logits: Tensor, params: RowParams, positions: Tensor, with_logprobs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample one token per row; see ``fastsafe_kernels.sample``.

    Args:
        logits: [M, V] fp32, not modified.
        params: Parameters of the M rows.
        positions: [M] int64, position of the sampled token in its sequence.
        with_logprobs: Whether to compute log-probabilities.

    Returns:
        Token ids [M] int64, their untempered log-probabilities [M] fp32 in nats, whether each
        row's logits are finite, and whether its token is one of its stop ids [M] bool.
    """
    p, ends = params, params.stop_ids
    return ops.sample(
        logits, p.temperature, p.top_k, p.top_p, p.min_p, p.seeds, positions, ends, with_logprobs
    )
