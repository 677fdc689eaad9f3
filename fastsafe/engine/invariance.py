"""Whether a GPU's own matrix products treat all rows of a batch alike, found out by trying.

At one shape a library runs one algorithm. Most give a row the same bits wherever it stands and
whatever stands beside it; those that split the sum by place do not.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe.model.transformer import Transformer

NAMES = ("qkv", "o", "gate_up", "down", "head")


def uneven_products(model: Transformer, rows: Sequence[int]) -> frozenset[str]:
    """Products of the model whose rows' bits depend on place or neighbours.

    Args:
        model: Its first layer's weights are tried, as all layers have their shapes, and the head.
        rows: Numbers of rows at which it is computed.
    """
    return frozenset(
        name
        for name in NAMES
        if not all(
            treats_rows_alike(model.head if name == "head" else model.weight(0, name), count)
            for count in rows
        )
    )


def agreeing_rows(model: Transformer, rows: int, smaller: Sequence[int]) -> list[int]:
    """Which smaller numbers of rows give every row the bits that it has among ``rows``.

    Args:
        model: Products in ``model.invariant_products`` agree at any number and are not tried.
        rows: The most.
        smaller: Numbers to try.
    """
    found = []
    for count in smaller:
        names = [name for name in NAMES if name not in model.invariant_products]
        weights = [model.head if name == "head" else model.weight(0, name) for name in names]
        if all(_agrees(weight, rows, count) for weight in weights):
            found.append(count)
    return found


def _agrees(weight: Tensor, rows: int, count: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight)
    return torch.equal(F.linear(x[:count], weight), F.linear(x, weight)[:count])


def treats_rows_alike(weight: Tensor, rows: int) -> bool:
    """Whether rows keep their bits when they are permuted, and when every other one is replaced."""
    generator = torch.Generator().manual_seed(0)
    x, others = torch.randn(2, rows, weight.shape[1], generator=generator).to(weight)
    y = F.linear(x, weight)
    order = torch.randperm(rows, generator=generator).to(weight.device)
    if not torch.equal(F.linear(x[order], weight), y[order]):
        return False
    stays = torch.arange(rows, device=weight.device) % 2 == 0
    for kept in (stays, ~stays):
        mixed = F.linear(torch.where(kept[:, None], x, others), weight)
        if not torch.equal(mixed[kept], y[kept]):
            return False
    return True
