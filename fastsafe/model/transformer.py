"""One decoder for every known architecture, over packed rows of tokens.

What differs between families is a flag of ``ModelConfig``. Attention and the linear layers are
hooks: the caller owns caching and masking (``Attend``), and adapters (``Project``).
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastsafe_kernels as ops
from fastsafe.model import layers
from fastsafe.model import weights as w
from fastsafe.model.config import ModelConfig
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.layers import add_rms_norm, gated, rms_norm, rope, softcap
from fastsafe.model.rope import Rotary, whole_lengths
from fastsafe.model.weights import TensorSource, Weights

Key = tuple[int, str]  # layer and name of a fused linear


class QKNorms(NamedTuple):
    """Norms of the heads of queries and keys, before they are rotated."""

    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]
    eps: float
    one_plus: bool


class Attend(Protocol):
    """Attention of one layer; owns the cache and the mask."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        """Attend, after rotation: q [N, H, D], k and v [N, Hkv, D] -> [N, H, D]."""


@runtime_checkable
class AttendQKV(Attend, Protocol):
    """Attention that also norms and rotates, for models that do not norm a whole projection."""

    def from_qkv(
        self,
        layer: int,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        norms: QKNorms | None,
        flags: AttentionFlags,
    ) -> Tensor:
        """Norm, rotate and attend: qkv [N, (H + 2 Hkv) D] -> [N, H, D].

        ``rotation`` is cos and sin, each [N, 1, R], of ``fastsafe.model.rope``.
        """


class Project(Protocol):
    """One fused linear of one layer, adapters included."""

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply x [M, I] by "qkv", "o", "gate_up" or "down" of a layer -> [M, O].

        ``rows`` are the indices [M] of the packed rows that x holds; None = all.
        """


class LinearSlot(NamedTuple):
    """Rows [begin, end) of a fused weight that are one linear module of the file."""

    layer: int
    name: str  # "qkv", "o", "gate_up" or "down"
    begin: int
    end: int
    in_features: int


def slots(config: ModelConfig) -> dict[str, LinearSlot]:
    """Map the path of every linear module, as PEFT names it, to rows of a fused weight."""
    return {
        f"model.layers.{i}.{module}": LinearSlot(i, field, begin, end, in_features)
        for i in range(config.num_layers)
        for module, field, begin, end, in_features, _ in w.linears(config)
    }


class Transformer:
    """A decoder's weights and its forward pass; made by ``load`` or ``random``.

    Attributes:
        config: Sizes and flags.
        device: Of all weights.
        dtype: Of all weights.
        embedding: [V, E].
        head: [V, E]; the same tensor as ``embedding`` when tied.
        layers: Fused weights of each layer.
        embedding_scale: Factor of the embedding, rounded to ``dtype``.
        final_norm: [E].
        invariant_products: Products that take ``ops.matmul_invariant`` on a GPU: "qkv", "o",
            "gate_up", "down", "head". Empty, except in a model from ``with_invariant``.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding, self.head, self.final_norm, self.layers = weights
        self.invariant_products: frozenset[str] = frozenset()
        self.device = self.embedding.device
        self.dtype = self.embedding.dtype
        self._rotaries = [Rotary(r, self.device, self.dtype) for r in config.ropes]
        # Gemma rounds the factor to the weights' dtype, which moves it by 0.1 % in bf16
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()

    @classmethod
    def load(
        cls,
        checkpoint: TensorSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Transformer":
        """Read a checkpoint.

        Args:
            checkpoint: An open ``fastsafe.io.checkpoint.Checkpoint``.
            device: Where the weights go.
            dtype: float32, bfloat16 or float16; weights of another dtype are converted.

        Raises:
            CheckpointError: The config is refused, or tensors are missing, unexpected, mis-shaped
                or not of a float dtype; nothing has been allocated then.
        """
        config = ModelConfig.from_json(checkpoint.config(), f"{checkpoint.path}/config.json")
        return cls(config, w.load(checkpoint, config, torch.device(device), dtype))

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Transformer":
        """Make a model with random weights, the same for a seed on every device.

        Matrices are normal with a standard deviation of 1/sqrt(in_features), the embedding of
        0.02; norms are the identity and biases zero.
        """
        weights = w.allocate(config, torch.device(device), dtype)
        generator = torch.Generator().manual_seed(seed)
        for place in w.placements(config):
            target = w.view(weights, place)
            if len(place.shape) == 2:
                std = 0.02 if place.layer == w.OUTSIDE else place.shape[1] ** -0.5
                target.copy_(torch.randn(place.shape, generator=generator) * std)
            else:
                is_one = place.field.endswith("norm") and not config.norm_one_plus
                target.fill_(1.0 if is_one else 0.0)
        return cls(config, weights)

    def with_invariant(self, names: Iterable[str]) -> "Transformer":
        """Return a model with these ``invariant_products`` that shares this model's weights."""
        model = copy.copy(self)
        model.invariant_products = frozenset(names)
        return model

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        project: Project | None = None,
        keep: Tensor | None = None,
        context_lens: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Run all layers over packed rows.

        Args:
            token_ids: [N] int64 in [0, V). The range is not checked.
            positions: [N] int64, index of each token in its own sequence.
            attend: Attention; called once per layer, in order.
            project: Linear layers; None = the base weights alone.
            keep: [M] int64, rows whose hidden state is returned; None = all. The last layer does
                its output projection and MLP for these rows only.
            context_lens: [N] int64, number of tokens of each row's own sequence up to the end
                of this call. Read only where ``config.depends_on_length`` (dynamic and longrope
                scaling); there None means that the rows are whole sequences from position 0.
            recompute: Keep for a backward pass only what enters each layer, and compute the rest
                again there. The bits are the same.

        Returns:
            [N, E], or [M, E], after the final norm; dtype of the weights.

        Raises:
            UsageError: ``context_lens`` is needed and missing.
        """
        config = self.config
        rotations = self.rotations(positions, context_lens)
        linear = self._project if project is None else project
        last = len(self.layers) - 1

        def run(i: int, h: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
            rotation = rotations[config.rope_of_layer[i]]
            rows = keep if i == last else None
            return self._layer(i, h, x, rotation, attend, linear, rows)

        h = F.embedding(token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            h = h * self.embedding_scale
        x: Tensor | None = None  # the last output, not yet added to h
        for i in range(len(self.layers)):
            if recompute:
                h, x = checkpoint(run, i, h, x, use_reentrant=False, preserve_rng_state=False)
            else:
                h, x = run(i, h, x)
        return self._enter(h, x, self.final_norm)[0]

    def _layer(
        self,
        i: int,
        h: Tensor,
        x: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        attend: Attend,
        linear: Project,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run layer ``i`` (after attention for ``rows`` only); return the next h and x."""
        layer, eps, one_plus = self.layers[i], self.config.norm_eps, self.config.norm_one_plus
        y, h = self._enter(h, x, layer.attention_norm)
        mixed = self._attend(i, linear(i, "qkv", y, None), rotation, attend)
        if rows is not None:
            mixed, h = mixed.index_select(0, rows), h.index_select(0, rows)
        x = linear(i, "o", mixed, rows)
        if layer.attention_out_norm is not None:
            x = rms_norm(x, layer.attention_out_norm, eps, one_plus)
        y, h = self._enter(h, x, layer.mlp_norm)
        gate_up = linear(i, "gate_up", y, rows)
        x = linear(i, "down", gated(gate_up, self.config.activation), rows)
        if layer.mlp_out_norm is not None:
            x = rms_norm(x, layer.mlp_out_norm, eps, one_plus)
        return h, x

    def _attend(
        self, i: int, qkv: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Norm, rotate and attend in layer ``i``: [N, (H + 2 Hkv) D] -> [N, H D]."""
        config, layer = self.config, self.layers[i]
        scale, window, cap = config.attention_scale, config.windows[i], config.attention_softcap
        flags = AttentionFlags(scale, window, cap)
        if isinstance(attend, AttendQKV) and config.qk_norm != "projection":
            norms = None
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = QKNorms(layer.q_norm, layer.k_norm, config.norm_eps, config.norm_one_plus)
            mixed = attend.from_qkv(i, qkv, rotation, norms, flags)
        else:
            q, k, v = self._rotated(layer, qkv, rotation)
            mixed = attend(i, q, k, v, flags)
        return mixed.reshape(-1, config.num_heads * config.head_dim)

    def _rotated(
        self, layer: w.Layer, qkv: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split into heads, norm and rotate: q [N, H, D], k and v [N, Hkv, D]."""
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        eps, one_plus = config.norm_eps, config.norm_one_plus
        if layer.q_norm is None or layer.k_norm is None:
            qkv = qkv.view(-1, heads + 2 * kv_heads, dim)
            qk, v = qkv.split_with_sizes((heads + kv_heads, kv_heads), 1)
            q, k = rope(qk, *rotation).split_with_sizes((heads, kv_heads), 1)
            return q, k, v
        q, k, v = qkv.split_with_sizes((heads * dim, kv_heads * dim, kv_heads * dim), 1)
        if config.qk_norm == "projection":
            q = rms_norm(q, layer.q_norm, eps, one_plus)
            k = rms_norm(k, layer.k_norm, eps, one_plus)
        q, k, v = (x.view(len(x), -1, dim) for x in (q, k, v))
        if config.qk_norm == "projection":
            return rope(q, *rotation), rope(k, *rotation), v
        q = rope(q, *rotation, layer.q_norm, eps, one_plus)
        return q, rope(k, *rotation, layer.k_norm, eps, one_plus), v

    def _enter(self, h: Tensor, x: Tensor | None, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add ``x`` to the residual stream ``h``; return the norm of the sum and the sum."""
        eps, one_plus = self.config.norm_eps, self.config.norm_one_plus
        alpha = self.config.residual_scale
        if x is None:
            return (h if norm is None else rms_norm(h, norm, eps, one_plus)), h
        if norm is None:
            h = torch.add(h, x, alpha=alpha)
            return h, h
        return add_rms_norm(x, h, norm, eps, one_plus, alpha)

    def rotations(
        self, positions: Tensor, context_lens: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return cos and sin, each [N, 1, R], of every token for each of ``config.ropes``."""
        if self.config.depends_on_length and context_lens is None:
            context_lens = whole_lengths(positions)
        return [rotary(positions, context_lens) for rotary in self._rotaries]

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply by the head: hidden [M, E] -> [M, V] fp32, scaled and capped as configured."""
        head = ops.matmul_invariant if "head" in self.invariant_products else layers.linear
        z = head(hidden, self.head).float()
        if self.config.logits_scale != 1.0:
            z = z / self.config.logits_scale
        cap = self.config.logits_softcap
        return z if cap is None else softcap(z, cap)

    def weight(self, layer: int, name: str) -> Tensor:
        """Return a fused weight: "qkv", "o", "gate_up" or "down" of a layer, [O, I]."""
        weight: Tensor = getattr(self.layers[layer], name)
        return weight

    def linear(self, layer: int, name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Multiply x [M, I] by a fused weight and add its bias -> [M, O].

        Args:
            layer: Index of the layer.
            name: "qkv", "o", "gate_up" or "down".
            x: [M, I].
            weight: [O, I] to use in place of the base's.
        """
        owner = self.layers[layer]
        weight = getattr(owner, name) if weight is None else weight
        bias = self.bias(layer, name)
        if name in self.invariant_products:
            y = ops.matmul_invariant(x, weight)
            return y if bias is None else y + bias
        return layers.linear(x, weight, bias)

    def bias(self, layer: int, name: str) -> Tensor | None:
        """Return the bias of a fused weight, [O]; None where there is none."""
        bias: Tensor | None = getattr(self.layers[layer], name + "_bias")
        return bias

    def tensors(self) -> dict[str, Tensor]:
        """List all weights under the names that transformers gives them, as views.

        A tied head is not listed. Views of a fused weight share memory; make them contiguous to
        save them.
        """
        weights = Weights(self.embedding, self.head, self.final_norm, self.layers)
        return {place.name: w.view(weights, place) for place in w.placements(self.config)}

    def slots(self) -> dict[str, LinearSlot]:
        """Map the path of every linear module, as PEFT names it, to rows of a fused weight."""
        return slots(self.config)

    def parameters(self) -> list[Tensor]:
        """List the distinct tensors of the model, fused as they are; a tied head once."""
        outside = [self.embedding, self.final_norm]
        if self.head is not self.embedding:
            outside.append(self.head)
        per_layer = [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return outside + per_layer

    def _project(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        return self.linear(layer, name, x)
