"""Row invariance of a GPU's matrix products, tested on the device.

At one shape a library runs one algorithm. Most algorithms give a row the same bits at any place and
beside any other rows; those that split the sum by place do not.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe.model.transformer import Transformer

NAMES = ("qkv", "o", "gate_up", "down", "head")


def uneven_products(model: Transformer, rows: Sequence[int]) -> frozenset[str]:
    """Return the products in which the bits of a row depend on its place or its neighbours.

    Args:
        model: Provides the weights: the head, and the first layer's, as all layers have their
            shapes.
        rows: Numbers of rows to test.
    """
    return frozenset(
        name
        for name in NAMES
        if not all(treats_rows_alike(_weight(model, name), count) for count in rows)
    )


def agreeing_rows(model: Transformer, rows: int, smaller: Sequence[int]) -> list[int]:
    """Return the smaller numbers of rows at which each row has the bits that it has among ``rows``.

    Args:
        model: Provides the weights; products in ``model.invariant_products`` agree at any number.
        rows: The largest number.
        smaller: Numbers to test.
    """
    weights = [_weight(model, name) for name in NAMES if name not in model.invariant_products]
    return [count for count in smaller if all(_agrees(w, rows, count) for w in weights)]


def _weight(model: Transformer, name: str) -> Tensor:
    return model.head if name == "head" else model.weight(0, name)


def _agrees(weight: Tensor, rows: int, count: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight)
    return torch.equal(F.linear(x[:count], weight), F.linear(x, weight)[:count])


def treats_rows_alike(weight: Tensor, rows: int) -> bool:
    """Test whether rows keep their bits when permuted, and when every other row is replaced."""
    generator = torch.Generator().manual_seed(0)
    x, others = torch.randn(2, rows, weight.shape[1], generator=generator).to(weight)
    y = F.linear(x, weight)
    order = torch.randperm(rows, generator=generator).to(weight.device)
    if not torch.equal(F.linear(x[order], weight), y[order]):
        return False
    is_even = torch.arange(rows, device=weight.device) % 2 == 0
    for kept in (is_even, ~is_even):
        replaced = F.linear(torch.where(kept[:, None], x, others), weight)
        if not torch.equal(replaced[kept], y[kept]):
            return False
    return True
