"""A LoRA adapter while it is trained: flat fp32 state and a differentiable projection."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe.model.lora import Adapter, LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import LinearSlot, Transformer


class _Part(NamedTuple):
    """One module's update inside a fused linear: output rows [begin, end), ranks [r0, r1)."""

    begin: int
    end: int
    r0: int
    r1: int
    scaling: float


class _Fused(NamedTuple):
    """Trained weights of the modules that share a fused linear and its input."""

    lora_A: Tensor  # [R_total, I], a view of the flat parameters
    lora_Bs: tuple[Tensor, ...]  # [O, R] of each module, views too
    parts: tuple[_Part, ...]


class _Lora(torch.autograd.Function):
    """y = x W^T + bias + x A^T B^T; W is frozen.

    B [O, R_total] has each module's scaled weights in its own block and zeros elsewhere, so that
    all modules of a fused linear share every product. With S = x A^T and dS = dY B:
        dX = dY W + dS A,   dA = dS^T x,   dB^T = S^T dY (its blocks only)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[_Part, ...],
        lora_A: Tensor,
        *lora_Bs: Tensor,
    ) -> Tensor:
        A = lora_A.to(x.dtype)
        B = x.new_zeros(weight.shape[0], len(A))
        for part, lora_B in zip(parts, lora_Bs, strict=True):
            torch.mul(lora_B, part.scaling, out=B[part.begin : part.end, part.r0 : part.r1])
        shrunk = x @ A.T
        y = F.linear(x, weight, bias).addmm_(shrunk, B.T)
        ctx.save_for_backward(x, shrunk, weight, A, B)
        ctx.parts, ctx.dtype = parts, lora_A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, shrunk, weight, A, B = ctx.saved_tensors
        dshrunk = dy @ B
        dA = (dshrunk.T @ x).to(ctx.dtype)
        dB = (shrunk.T @ dy).to(ctx.dtype)
        dx = (dy @ weight).addmm_(dshrunk, A) if ctx.needs_input_grad[0] else None
        blocks = [dB[p.r0 : p.r1, p.begin : p.end].T * p.scaling for p in ctx.parts]
        return dx, None, None, None, dA, *blocks


class TrainedLora:
    """Weights of one adapter in training, as one flat fp32 vector with views into it."""

    def __init__(self, model: Transformer, config: LoraConfig, seed: int) -> None:
        """Make the initial weights: A uniform in +-1/sqrt(I) as PEFT draws it, B zero."""
        self.config = config
        slots = model.slots()
        modules = config.modules(slots, "TrainConfig")
        groups: dict[tuple[int, str], list[LinearSlot]] = {}
        ranks: dict[tuple[int, str], list[tuple[int, float]]] = {}
        self._modules: dict[tuple[int, str], list[str]] = {}
        for module in modules:
            slot = slots[module]
            key = (slot.layer, slot.name)
            groups.setdefault(key, []).append(slot)
            ranks.setdefault(key, []).append((config.rank_of(module), config.scaling_of(module)))
            self._modules.setdefault(key, []).append(module)
        sizes = [
            rank * (slot.in_features + slot.end - slot.begin)
            for key in groups
            for slot, (rank, _) in zip(groups[key], ranks[key], strict=True)
        ]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        self.flat = self.flat.to(model.device)
        self.fused: dict[tuple[int, str], _Fused] = {}
        self.leaves: list[Tensor] = []
        at = 0

        def take(rows: int, columns: int) -> Tensor:
            nonlocal at
            view = self.flat[at : at + rows * columns].view(rows, columns)
            at += rows * columns
            return view

        for key, members in groups.items():
            total = sum(rank for rank, _ in ranks[key])
            in_features = members[0].in_features
            lora_A = take(total, in_features)
            bound = 1 / math.sqrt(in_features)
            lora_A.copy_(
                torch.empty(total, in_features).uniform_(-bound, bound, generator=generator)
            )
            lora_Bs, parts, r0 = [], [], 0
            for slot, (rank, scaling) in zip(members, ranks[key], strict=True):
                lora_Bs.append(take(slot.end - slot.begin, rank))
                parts.append(_Part(slot.begin, slot.end, r0, r0 + rank, scaling))
                r0 += rank
            # detached views are leaves of their own that share the flat storage
            leaves = [t.detach().requires_grad_() for t in (lora_A, *lora_Bs)]
            self.fused[key] = _Fused(leaves[0], tuple(leaves[1:]), tuple(parts))
            self.leaves += leaves

    def projection(self, model: Transformer, dropout: float, seed: int) -> "_Projection":
        """Differentiable ``Project`` for one tile; ``seed`` decides its dropout masks."""
        return _Projection(model, self.fused, dropout, seed)

    def adapter(self, name: str) -> Adapter:
        """The weights as they are now, copied, as an adapter."""
        weights = {}
        for key, fused in self.fused.items():
            for module, part, lora_B in zip(
                self._modules[key], fused.parts, fused.lora_Bs, strict=True
            ):
                weights[module] = LoraWeights(
                    fused.lora_A[part.r0 : part.r1].detach().clone(),
                    lora_B.detach().clone(),
                    part.scaling,
                )
        return Adapter(name, self.config, weights)


class _Projection:
    def __init__(
        self,
        model: Transformer,
        fused: Mapping[tuple[int, str], _Fused],
        dropout: float,
        seed: int,
    ) -> None:
        self.model = model
        self.fused = fused
        self.dropout = dropout
        if dropout:
            self.generator = torch.Generator(device=model.device).manual_seed(seed)

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        lora = self.fused.get((layer, name))
        if lora is None:
            return self.model.linear(layer, name, x)
        if self.dropout:
            return self._with_dropout(layer, name, x, lora)
        weight, bias = self.model.weight(layer, name), self.model.bias(layer, name)
        y: Tensor = _Lora.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, lora.parts, lora.lora_A, *lora.lora_Bs
        )
        return y

    def _with_dropout(self, layer: int, name: str, x: Tensor, lora: _Fused) -> Tensor:
        """Each module has its own mask, as in PEFT, so their inputs are no longer shared."""
        y = self.model.linear(layer, name, x)
        update = torch.zeros_like(y)
        for part, lora_B in zip(lora.parts, lora.lora_Bs, strict=True):
            keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.dropout
            dropped = x * keep / (1 - self.dropout)
            shrunk = dropped @ lora.lora_A[part.r0 : part.r1].T.to(x.dtype)
            update[:, part.begin : part.end] = part.scaling * (shrunk @ lora_B.T.to(x.dtype))
        return y + update
