"""A LoRA adapter in training: flat fp32 state and a differentiable projection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastsafe_kernels as ops
from fastsafe.model import cpu_ops
from fastsafe.model.lora import Adapter, LoraWeights
from fastsafe.model.nf4 import NF4Transformer
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import Key, LinearSlot, Transformer
from fastsafe.train.batches import hash_seed
from fastsafe_kernels import Segments

# Rows of a tile of the products on a GPU, and of the sums over rows in their gradients.
_TILE, _SUMS = 64, 1024


class _FusedModule(NamedTuple):
    """One module's update inside a fused linear: output rows [begin, end), ranks [r0, r1)."""

    module: str
    begin: int
    end: int
    r0: int
    r1: int
    scaling: float


class _Factors(NamedTuple):
    """A and the modules' B of one fused linear, or their gradients: views of one flat vector."""

    lora_A: Tensor  # [R_total, I], the modules' A stacked: they share their input
    lora_Bs: tuple[Tensor, ...]  # [R, O] of each module, transposed


class _Update(NamedTuple):
    """Inputs of the products of one fused linear, or of one of its modules."""

    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [R, O]; each module's in its own block, zeros elsewhere
    scaling: Tensor  # [R]
    blocks: tuple[tuple[slice, slice, Tensor], ...]  # ranks, outputs and gradient of each B
    gradient_A: Tensor


class Rows(NamedTuple):
    """Numbers of rows of a tile's parts, which are concatenated."""

    rows: Sequence[int]
    kept: Sequence[int]  # rows of each part that the last layer keeps
    first: int = 0  # index of the first part; more than 0 where parts run one after another


class _Lora(torch.autograd.Function):
    """y = x W^T + bias + S B with S = s x A^T; W is frozen, or absent with its product.

    With dS = s dY B^T:  dX = dY W + dS A,  dA += dS^T x,  dB += S^T dY (its blocks only).
    The gradients of A and B are accumulated into the optimizer's vector, past autograd. Their sums
    run over rows in order (``cpu_ops.linear``), so splitting a tile gives identical bits.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, u: _Update
    ) -> Tensor:
        shrunk = cpu_ops.linear(x, u.lora_A).mul_(u.scaling)
        ctx.save_for_backward(x, shrunk, weight)
        ctx.update = u
        if weight is None:
            return cpu_ops.linear(shrunk, u.lora_B.T)
        return cpu_ops.linear(x, weight, bias, second_product=(shrunk, u.lora_B.T))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, shrunk, weight = ctx.saved_tensors
        u: _Update = ctx.update
        dshrunk = cpu_ops.linear(dy, u.lora_B).mul_(u.scaling)
        cpu_ops.linear(dshrunk.T, x.T, accumulate_into=u.gradient_A)
        for ranks, outputs, gradient in u.blocks:
            cpu_ops.linear(shrunk[:, ranks].T, dy[:, outputs].T, accumulate_into=gradient)
        dx = None
        if ctx.needs_input_grad[1]:
            A = u.lora_A.T
            if weight is None:
                dx = cpu_ops.linear(dshrunk, A)
            else:
                dx = cpu_ops.linear(dy, weight.T, second_product=(dshrunk, A))
        return None, dx, None, None, None


@lru_cache(maxsize=64)
def _tables(rows: int, device: torch.device) -> tuple[Segments, Segments]:
    """Build the segment tables of one adapter: for its products, and for its sums over rows."""
    ids = [0] * rows
    tiles = Segments.build(ids, 1, _TILE, device=device)
    return tiles, Segments.build(ids, 1, _SUMS, device=device)


class _LoraOnOps(torch.autograd.Function):
    """``_Lora`` on the grouped ops with one adapter, for a GPU."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, u: _Update
    ) -> Tensor:
        ctx.tiles, ctx.sums = _tables(len(x), x.device)
        ctx.parts = tuple((outputs.start, outputs.stop) for _, outputs, _ in u.blocks)
        A = u.lora_A.to(x.dtype)[None]
        rank, width = len(u.blocks[0][2]), u.lora_B.shape[1]
        B = x.new_zeros(1, width, rank)
        for ranks, outputs, _ in u.blocks:
            B[0, outputs] = u.lora_B[ranks, outputs].T.to(x.dtype)
        y = x.new_zeros(len(x), width) if weight is None else F.linear(x, weight, bias)
        scaling = u.scaling.to(x.dtype)
        shrunk = ops.lora_shrink(x, A, ctx.tiles, len(ctx.parts)) * scaling
        ops.lora_expand(y, shrunk, B, ctx.tiles, ctx.parts)
        ctx.save_for_backward(x, shrunk, weight, A, B, scaling)
        ctx.update = u
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, shrunk, weight, A, B, scaling = ctx.saved_tensors
        u: _Update = ctx.update
        dshrunk, dB = ops.lora_backward_b(dy, shrunk, B, ctx.sums, ctx.parts)
        dshrunk = dshrunk * scaling
        u.gradient_A.add_(ops.lora_backward_a(dshrunk, x, ctx.sums)[0])
        for _, outputs, gradient in u.blocks:
            gradient.add_(dB[0, outputs].T)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x) if weight is None else dy @ weight
            inputs = ((0, x.shape[1]),)
            targets = len(ctx.parts)
            ops.lora_expand(dx, dshrunk, A.transpose(1, 2), ctx.tiles, inputs, targets=targets)
        return None, dx, None, None, None


class LoraLayout:
    """Layout of an adapter's weights in one flat vector.

    Attributes:
        parts: Modules of each fused linear that carry the adapter.
        in_features: Inputs of each fused linear.
        size: P, number of weights.
        widths: Outputs of each fused linear.
        block_size: Elements of the B of all fused linears with their zeros.
    """

    def __init__(self, model: Transformer, config: LoraConfig) -> None:
        """Select the modules.

        Raises:
            AdapterError: A target names no module of the model.
        """
        slots = model.slots()
        members: dict[Key, list[tuple[str, LinearSlot]]] = {}
        for module in config.modules(slots, "TrainConfig"):
            slot = slots[module]
            members.setdefault((slot.layer, slot.name), []).append((module, slot))
        self.parts: dict[Key, tuple[_FusedModule, ...]] = {}
        for key, modules in members.items():
            parts, r0 = [], 0
            for module, slot in modules:
                r1 = r0 + config.rank_of(module)
                scaling = config.scaling_of(module)
                parts.append(_FusedModule(module, slot.begin, slot.end, r0, r1, scaling))
                r0 = r1
            self.parts[key] = tuple(parts)
        self.in_features = {key: modules[0][1].in_features for key, modules in members.items()}
        ends: dict[Key, int] = {}
        for slot in slots.values():
            key = slot.layer, slot.name
            ends[key] = max(slot.end, ends.get(key, 0))
        self.widths = {key: ends[key] for key in members}
        self.size = sum(
            parts[-1].r1 * self.in_features[key]
            + sum((p.end - p.begin) * (p.r1 - p.r0) for p in parts)
            for key, parts in self.parts.items()
        )
        self.block_size = sum(p[-1].r1 * self.widths[key] for key, p in self.parts.items())


class TrainedLora:
    """Weights of one adapter in training, as one flat fp32 vector with views into it."""

    def __init__(self, model: Transformer, config: LoraConfig, seed: int) -> None:
        """Make the initial weights: A uniform in +-1/sqrt(I) as PEFT draws it, B zero."""
        self.config = config
        self.model = model
        layout = LoraLayout(model, config)
        self.parts = layout.parts
        self._in_features = layout.in_features
        self.flat = torch.zeros(layout.size, dtype=torch.float32, device=model.device)
        self.factors = self._views(self.flat)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        for factors in self.factors.values():
            bound = 1 / math.sqrt(factors.lora_A.shape[1])
            initial = torch.empty(factors.lora_A.shape).uniform_(-bound, bound, generator=generator)
            factors.lora_A.copy_(initial)
        self._scaling = {
            key: torch.cat([torch.full((p.r1 - p.r0,), p.scaling) for p in parts]).to(model.device)
            for key, parts in self.parts.items()
        }
        self._blocks = {
            key: torch.zeros(
                parts[-1].r1, layout.widths[key], dtype=torch.float32, device=model.device
            )
            for key, parts in self.parts.items()
        }

    def _views(self, flat: Tensor) -> dict[Key, _Factors]:
        """Return the factors of every fused linear as views of ``flat``."""
        views, offset = {}, 0

        def next_view(rows: int, columns: int) -> Tensor:
            nonlocal offset
            offset += rows * columns
            return flat[offset - rows * columns : offset].view(rows, columns)

        for key, parts in self.parts.items():
            lora_A = next_view(parts[-1].r1, self._in_features[key])
            lora_Bs = tuple(next_view(p.r1 - p.r0, p.end - p.begin) for p in parts)
            views[key] = _Factors(lora_A, lora_Bs)
        return views

    def refresh(self) -> None:
        """Copy B into the fused blocks; call it when the flat vector has changed."""
        for key, parts in self.parts.items():
            for part, lora_B in zip(parts, self.factors[key].lora_Bs, strict=True):
                self._blocks[key][part.r0 : part.r1, part.begin : part.end] = lora_B

    def projection(
        self,
        dropout: float,
        seed: int,
        rows: Rows | None = None,
        gradient: Tensor | None = None,
    ) -> "Projection":
        """Make a differentiable ``Project`` for one tile.

        Args:
            dropout: Share of the inputs set to 0.
            seed: Seeds the dropout masks, with the index of a part.
            rows: Rows of the parts of the tile; None = it is one part.
            gradient: [P] fp32 to accumulate into; None = zeros.
        """
        gradient = torch.zeros_like(self.flat) if gradient is None else gradient
        views = self._views(gradient)
        updates: dict[Key, list[tuple[_FusedModule, _Update]]] = {}
        whole: dict[Key, _Update] = {}
        for key, parts in self.parts.items():
            factors, gradients, scaling = self.factors[key], views[key], self._scaling[key]
            if dropout:
                updates[key] = [
                    (part, _module_update(part, i, factors, gradients, scaling))
                    for i, part in enumerate(parts)
                ]
            blocks = tuple(
                (slice(p.r0, p.r1), slice(p.begin, p.end), g)
                for p, g in zip(parts, gradients.lora_Bs, strict=True)
            )
            lora_B = self._blocks[key]
            whole[key] = _Update(factors.lora_A, lora_B, scaling, blocks, gradients.lora_A)
        return Projection(self.model, gradient, whole, updates, dropout, seed, rows)

    def adapter(self, name: str) -> Adapter:
        """Copy the present weights to an adapter."""
        weights = {}
        for key, factors in self.factors.items():
            for part, lora_B in zip(self.parts[key], factors.lora_Bs, strict=True):
                lora_A = factors.lora_A[part.r0 : part.r1].clone()
                weights[part.module] = LoraWeights(lora_A, lora_B.T.clone(), part.scaling)
        return Adapter(name, self.config, weights)

    def save(self, folder: Path) -> None:
        """Write the present weights to a PEFT directory, whole or not at all."""
        self.adapter(folder.name).save(folder)


@dataclass(eq=False)
class Projection:
    """``Project`` of one tile.

    Attributes:
        gradient: [P] fp32, like the adapter's flat vector; complete after the backward pass.
        model: To run the tile through.
    """

    model: Transformer
    gradient: Tensor
    whole: dict[Key, _Update]
    modules: dict[Key, list[tuple[_FusedModule, _Update]]]  # only with dropout
    dropout: float
    seed: int
    rows: Rows | None

    def __post_init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd record the first layer

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by a fused linear and its update; see ``Project``."""
        update = self.whole.get((layer, name))
        if update is None:
            return self.model.linear(layer, name, x)
        if self.dropout:
            return self._with_dropout(layer, name, x, is_kept=rows is not None)
        if isinstance(self.model, NF4Transformer):  # do not keep the dequantized weight
            return self.model.linear(layer, name, x) + self._apply(x, None, None, update)
        weight, bias = self.model.weight(layer, name), self.model.bias(layer, name)
        return self._apply(x, weight, bias, update)

    def _with_dropout(self, layer: int, name: str, x: Tensor, *, is_kept: bool) -> Tensor:
        """Apply each module to its own masked input, as PEFT does."""
        y = self.model.linear(layer, name, x)
        sizes: Sequence[int] = [len(x)]
        first = 0
        if self.rows:
            sizes, first = self.rows.kept if is_kept else self.rows.rows, self.rows.first
        tile_parts = list(enumerate(x.split_with_sizes(sizes), first))
        pieces, end = [], 0
        for module, (part, update) in enumerate(self.modules[layer, name]):
            keep = torch.cat([self._mask(rows, i, layer, name, module) for i, rows in tile_parts])
            pieces.append(y.new_zeros(len(y), part.begin - end))
            dropped = x * keep / (1 - self.dropout)
            pieces.append(self._apply(dropped, None, None, update))
            end = part.end
        return y + torch.cat([*pieces, y.new_zeros(len(y), y.shape[1] - end)], 1)

    def _mask(self, x: Tensor, part: int, layer: int, name: str, module: int) -> Tensor:
        """Draw the keep-mask of one part's rows, whatever is computed beside or before it."""
        seed = hash_seed(self.seed, part, layer, *name.encode(), module)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        return torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout

    def _apply(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: _Update
    ) -> Tensor:
        function = _Lora if cpu_ops.runs_natively(x) else _LoraOnOps
        y: Tensor = function.apply(self._anchor, x, weight, bias, update)  # type: ignore[no-untyped-call]
        return y


def _module_update(
    part: _FusedModule, i: int, factors: _Factors, gradients: _Factors, scaling: Tensor
) -> _Update:
    """Return the update of the ``i``-th module of a fused linear alone."""
    ranks, lora_B = slice(part.r0, part.r1), factors.lora_Bs[i]
    block = (slice(0, len(lora_B)), slice(0, lora_B.shape[1]), gradients.lora_Bs[i])
    return _Update(factors.lora_A[ranks], lora_B, scaling[ranks], (block,), gradients.lora_A[ranks])
