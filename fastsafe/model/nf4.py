"""A base with its linear weights in 4 bits: NF4 codes, dequantized for each use.

Dettmers et al. 2023, arXiv:2305.14314. Embedding, head, norms and biases stay as they are. A weight
of the file is cut into blocks of 64 in row order, as bitsandbytes cuts it, whether or not rows are
whole blocks.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastsafe_kernels as ops
from fastsafe.errors import CheckpointError
from fastsafe.model import layers
from fastsafe.model import weights as w
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import Key, Transformer
from fastsafe_kernels.nf4_dequantize import BLOCK

MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class NF4Weight:
    """One fused weight in 4 bits.

    Attributes:
        codes: [O I / 64, 32] uint8, two weights per byte.
        absmax: [O I / 64, 1] fp32.
        shape: (O, I).
        dtype: Dtype of the dequantized weights.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "NF4Weight":
        """Quantize [O, I] fp32, bf16 or fp16; O I is a multiple of 64."""
        codes, absmax = ops.nf4_quantize(weight.reshape(-1, BLOCK).contiguous())
        rows, columns = weight.shape
        return cls(codes, absmax, (rows, columns), weight.dtype)

    def dequantize(self) -> Tensor:
        """Return the weight [O, I] in a new tensor."""
        return ops.nf4_dequantize(self.codes, self.absmax, self.dtype).view(self.shape)


class NF4Transformer(Transformer):
    """A ``Transformer`` whose fused linear weights are NF4; made by ``load``.

    Its layers hold no matrices: ``weight`` and ``linear`` dequantize them, and the backward pass
    does so again, so that no more than one is there at a time.
    """

    def __init__(
        self, config: ModelConfig, weights: w.Weights, quantized: dict[Key, NF4Weight]
    ) -> None:
        super().__init__(config, weights)
        self.quantized = quantized

    def weight(self, layer: int, name: str) -> Tensor:
        """Dequantize a fused weight: "qkv", "o", "gate_up" or "down" of a layer, [O, I]."""
        return self.quantized[layer, name].dequantize()

    def linear(self, layer: int, name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Multiply x [M, I] by a fused weight and add its bias; see ``Transformer.linear``."""
        if weight is None and torch.is_grad_enabled() and x.requires_grad:
            held, bias = self.quantized[layer, name], self.bias(layer, name)
            y: Tensor = _NF4Linear.apply(x, held, bias)  # type: ignore[no-untyped-call]
            return y
        return super().linear(
            layer, name, x, self.weight(layer, name) if weight is None else weight
        )

    def tensors(self) -> dict[str, Tensor]:
        """List all weights as ``Transformer.tensors`` does; the matrices are dequantized copies."""
        named = super().tensors()
        for place in w.placements(self.config):
            if (place.layer, place.field) in self.quantized:
                weight = self.weight(place.layer, place.field)
                named[place.name] = weight[place.begin : place.end]
        return named

    def parameters(self) -> list[Tensor]:
        """List the tensors in memory: codes and absmax, and what is not quantized."""
        tensors = [t for t in super().parameters() if t.numel()]
        for weight in self.quantized.values():
            tensors += [weight.codes, weight.absmax]
        return tensors


class _NF4Linear(torch.autograd.Function):
    """y = x W^T + b and dx = dy W for a frozen W that is not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return layers.linear(x, weight.dequantize(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight: NF4Weight = ctx.weight
        return layers.linear(grads[0].contiguous(), weight.dequantize().T), None, None


def load(
    source: w.TensorSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NF4Transformer:
    """Read a checkpoint and quantize it, one layer in full precision at a time.

    Args:
        source: An open ``fastsafe.io.checkpoint.Checkpoint``.
        device: Where the weights go.
        dtype: Of what is not quantized and of the dequantized weights; the codes are those of the
            weights in this dtype.

    Raises:
        CheckpointError: As ``Transformer.load``, or a weight is no multiple of 64 elements.
    """
    config = ModelConfig.from_json(source.config(), f"{source.path}/config.json")
    source = w.checked(source, config)
    device = torch.device(device)
    places = list(w.placements(config))
    for place in places:
        size = math.prod(place.shape)
        if place.field in MATRICES and size % BLOCK:
            raise CheckpointError(
                f"{source.path}: tensor {place.name} has {size} elements, expected a "
                f"multiple of {BLOCK} for NF4; load the model without quantization"
            )
    quantized: dict[Key, NF4Weight] = {}
    empty = torch.empty(0, device=device, dtype=dtype)

    def fields(layer: int) -> dict[str, Tensor]:
        of_layer = [place for place in places if place.layer == layer]
        tensors = source.read([place.name for place in of_layer])
        blocks: dict[str, list[Tensor]] = {}
        for place in of_layer:  # blocks of a field come in order
            blocks.setdefault(place.field, []).append(tensors.pop(place.name).to(device, dtype))
        fused = {name: torch.cat(parts) for name, parts in blocks.items()}
        for name in MATRICES:
            if name in fused:
                quantized[layer, name] = NF4Weight.of(fused[name])
                fused[name] = empty
        return fused

    outside = fields(w.OUTSIDE)
    embedding = outside["embedding"]
    w.check_tied(source, config, embedding)
    held = [w.Layer(**fields(layer)) for layer in range(config.num_layers)]
    head = outside.get("head", embedding)
    weights = w.Weights(embedding, head, outside["final_norm"], held)
    return NF4Transformer(config, weights, quantized)
