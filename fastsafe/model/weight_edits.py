"""Arithmetic on fine-tuned weights: adapters in their factors, checkpoints tensor by tensor.

Everything goes by the name of a module or tensor, never by its place in a list or by a dimension
that happens to equal a rank, so keys narrower than queries, biases and tied heads need no care.
Sums are made in float32 (float64 where a file holds it) and rounded to the file's dtype once.

An edit that keeps a LoRA update a product of thin matrices gives a LoRA adapter again: scaling it,
projecting it (C B A has the factors C B and A), adding two. Dropping entries at random or adding a
difference of two models does not, and any adapter for it would be an approximation: such an edit
gives a checkpoint. Nothing is edited in place.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastsafe.errors import AdapterError, CheckpointError, UsageError
from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, LoraWeights
from fastsafe.model.transformer import slots
from fastsafe.model.weights import TensorSource


def read_adapter(path: Path, base: TensorSource) -> Adapter:
    """Read a PEFT directory and check every tensor against a checkpoint that is not loaded.

    Raises:
        AdapterError: The adapter is malformed, partial, or does not fit.
        CheckpointError: The checkpoint's config is refused.
    """
    config = ModelConfig.from_json(base.config(), f"{base.path}/config.json")
    return Adapter.load(path, slots(config))


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Return the adapter with its update times ``factor``; tensors are shared, only alpha moves.

    For a LoRA update this is (1 - factor) * base + factor * tuned, exactly: WiSE-FT (Wortsman et
    al. 2021, arXiv:2109.01903).

    Raises:
        UsageError: ``factor`` is not in [0, 1].
    """
    if not 0 <= factor <= 1:
        raise UsageError(f"scale of adapter {adapter.name!r} is {factor}, expected one in [0, 1]")
    config = replace(
        adapter.config,
        alpha=adapter.config.alpha * factor,
        alpha_pattern={k: alpha * factor for k, alpha in adapter.config.alpha_pattern.items()},
    )
    weights = {
        module: lora._replace(scaling=config.scaling_of(module))
        for module, lora in adapter.weights.items()
    }
    return Adapter(adapter.name, config, weights)


def inner(x: LoraWeights, y: LoraWeights) -> float:
    """Compute the inner product of B A of two updates [O, I], without their scalings.

    trace((Bx^T By)(Ay Ax^T)): no [O, I] matrix is made.
    """
    (ax, bx, _), (ay, by, _) = x, y
    outputs = bx.double().T @ by.double()
    return float((outputs * (ax.double() @ ay.double().T)).sum())


def cosine(x: LoraWeights, y: LoraWeights) -> float | None:
    """Compute the cosine of two updates as vectors; None where one of them is zero."""
    norms = math.sqrt(max(inner(x, x), 0.0)) * math.sqrt(max(inner(y, y), 0.0))
    return max(-1.0, min(1.0, inner(x, y) / norms)) if norms else None


def project(lora: LoraWeights, aligned: Tensor, unaligned: Tensor) -> LoraWeights | None:
    """Project an update onto the change that alignment made to the same weight.

    C = V V^T / ||V||_F with V = aligned - unaligned, and B <- C B. V (V^T B) needs no [O, O]
    matrix, and the rank stays. C is no orthogonal projection: its scale is V's, as published.

    Args:
        lora: Update of one module, A [R, I] and B [O, R].
        aligned: Weight [O, I] of the aligned model.
        unaligned: The same weight before alignment.

    Returns:
        The projected update, in the dtype of B; None where alignment left the weight unchanged.

    Source: Hsu et al. 2024, SafeLoRA.
    """
    change = wide(aligned) - wide(unaligned)
    norm = float(torch.linalg.vector_norm(change))
    if norm == 0:
        return None
    lora_B = change @ (change.T @ lora.lora_B.to(change)) / norm
    return lora._replace(lora_B=lora_B.to(lora.lora_B.dtype))


class Projected(NamedTuple):
    """An adapter's modules beside their projections onto the safety subspace."""

    updates: dict[str, LoraWeights]  # of the modules whose weight alignment changed
    cosines: dict[str, float]  # between update and projection, where neither is zero


def project_all(adapter: Adapter, aligned: TensorSource, unaligned: TensorSource) -> Projected:
    """Project every module of an adapter, one weight after another.

    Raises:
        CheckpointError: ``unaligned`` lacks a weight, has another shape, or is the same model.
    """
    updates: dict[str, LoraWeights] = {}
    cosines: dict[str, float] = {}
    for module, lora in adapter.weights.items():
        name = f"{module}.weight"
        weight = aligned.read([name])[name]
        projected = project(lora, weight, read_like(unaligned, name, aligned))
        if projected is not None:
            updates[module] = projected
            similar = cosine(projected, lora) if lora.scaling else None
            if similar is not None:
                cosines[module] = similar
    if not updates:
        raise CheckpointError(
            f"{unaligned.path}: weights equal those of {aligned.path}, expected the model before "
            "alignment; give the pretrained checkpoint"
        )
    return Projected(updates, cosines)


def add(x: LoraWeights, y: LoraWeights, a: float, b: float) -> LoraWeights:
    """Return a x + b y as one update with x's scaling: the factors side by side.

    Exact but for the rounding of B; the rank is the sum of the ranks. A part whose weight is 0 is
    left out.
    """
    parts = [
        (lora_A, factor * scaling / x.scaling * wide(lora_B))
        for (lora_A, lora_B, scaling), factor in ((x, a), (y, b))
        if factor
    ]
    dtype = x.lora_B.dtype
    return LoraWeights(
        torch.cat([wide(lora_A) for lora_A, _ in parts]).to(dtype),
        torch.cat([lora_B for _, lora_B in parts], 1).to(dtype),
        x.scaling,
    )


def uniform(adapter: Adapter, weights: Mapping[str, LoraWeights]) -> Adapter:
    """Return an adapter of these updates with one rank and one scaling for all modules.

    Factors are padded with zeros to the largest rank, and where scalings differ they go into B, so
    that the config needs no pattern per module: not every server reads those.
    """
    rank = max(lora.lora_A.shape[0] for lora in weights.values())
    scaling = max((lora.scaling for lora in weights.values()), key=abs)
    config = replace(
        adapter.config,
        rank=rank,
        alpha=scaling * rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
    )
    padded = {}
    for module, (lora_A, lora_B, old_scaling) in weights.items():
        pad = rank - lora_A.shape[0]
        if old_scaling != scaling:
            lora_B = (wide(lora_B) * (old_scaling / scaling)).to(lora_B.dtype)
        padded[module] = LoraWeights(
            torch.nn.functional.pad(lora_A, (0, 0, 0, pad)),
            torch.nn.functional.pad(lora_B, (0, pad)),
            config.scaling_of(module),
        )
    return Adapter(adapter.name, config, padded)


def read_like(source: TensorSource, name: str, like: TensorSource) -> Tensor:
    """Read a tensor that must have the shape it has in another checkpoint.

    Raises:
        CheckpointError: It is absent or has another shape.
    """
    shape, expected = source.shapes.get(name), like.shapes[name]
    if shape != expected:
        actual = "absent" if shape is None else list(shape)
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is {actual}, expected {list(expected)} as in"
            f" {like.path}; "
            "give a checkpoint of the same architecture and vocabulary"
        )
    return source.read([name])[name]


def check_modules(adapter: Adapter, other: Adapter) -> None:
    """Refuse a second adapter that lacks modules of the first.

    Raises:
        AdapterError: Names a module.
    """
    missing = [module for module in adapter.weights if module not in other.weights]
    if missing:
        raise AdapterError(
            f"adapter {other.name!r}: has no update of {missing[0]} and {len(missing) - 1} more "
            f"modules of {adapter.name!r}; train both with the same target_modules"
        )


def wide(tensor: Tensor) -> Tensor:
    """Return float32, or the tensor itself where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
