"""Sampling parameters of a batch, as the op that draws its tokens takes them."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe_kernels as ops
from fastsafe.engine.request import SamplingParams

# Below it, logits divided by the temperature leave fp32; what is drawn is the most likely token
# long before.
_COLDEST = 1e-30


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
        stop_ids: Sequence[Collection[int]] | None = None,
    ) -> "RowParams":
        """Tensors of the rows' parameters, in order; ``stop_ids`` of each row, None for none."""

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        signed = [(p.seed + (1 << 63)) % (1 << 64) - (1 << 63) for p in params]
        return cls(
            torch.tensor(signed, dtype=torch.int64, device=device),
            floats([p.temperature if p.temperature >= _COLDEST else 0.0 for p in params]),
            torch.tensor([p.top_k for p in params], device=device),
            floats([p.top_p for p in params]),
            floats([p.min_p for p in params]),
            _padded(stop_ids or [()] * len(params), device),
        )

    def take(self, index: Tensor) -> "RowParams":
        """Parameters of the rows ``index``."""
        return RowParams(*(each[index] for each in self))


def _padded(rows: Sequence[Collection[int]], device: torch.device) -> Tensor:
    most = max((len(row) for row in rows), default=0)
    padded = [[*sorted(row), *[-1] * (most - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), most)


def sample(
    logits: Tensor, params: RowParams, positions: Tensor, with_logprobs: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one token per row; see ``fastsafe_kernels.sample``.

    Args:
        logits: [M, V] fp32, not modified.
        params: Parameters of the M rows.
        positions: [M] int64, index in its sequence of the token to be drawn.
        with_logprobs: Whether the log-probabilities are wanted.

    Returns:
        Token ids [M] int64, their untempered log-probabilities [M] fp32 in nats, whether each
        row's logits are finite, and whether its token is one of its stop ids [M] bool.
    """
    p = params
    rows = p.temperature, p.top_k, p.top_p, p.min_p, p.seeds, positions, p.stop_ids
    return ops.sample(logits, *rows, with_logprobs)
