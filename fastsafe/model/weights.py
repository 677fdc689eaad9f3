"""Maps a checkpoint's tensors to the decoder's fused weights.

A fused weight holds several tensors of the file as blocks of rows: q, k and v, gate and up.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastsafe.errors import CheckpointError
from fastsafe.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
OUTSIDE = -1  # layer of a tensor that belongs to none
_BUFFER = ".rotary_emb.inv_freq"
_MAX_NAMED = 8  # tensors that one message lists per kind of fault
_FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors spells them


class TensorSource(Protocol):
    """The parts of a checkpoint that models read; see ``fastsafe.io.checkpoint.Checkpoint``."""

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Dtype of every tensor, by name, as safetensors spells it."""

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read tensors by name."""

    def config(self) -> dict[str, Any]:
        """Read config.json."""


class Placement(NamedTuple):
    """Destination of one tensor of the file: rows [begin, end) of a field of a layer."""

    name: str  # as the file and transformers name it
    layer: int  # OUTSIDE for the embedding, the head and the final norm
    field: str  # of Layer, or of the transformer
    begin: int
    end: int
    shape: tuple[int, ...]


@dataclass
class Layer:
    """Weights of one decoder layer; None where the architecture has none."""

    qkv: Tensor  # [(H + 2 Hkv) * D, E]
    o: Tensor  # [E, H * D]
    gate_up: Tensor  # [2F, E]
    down: Tensor  # [E, F]
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    attention_norm: Tensor | None = None  # [E], before attention
    attention_out_norm: Tensor | None = None  # [E], after attention
    mlp_norm: Tensor | None = None  # [E], before the MLP
    mlp_out_norm: Tensor | None = None  # [E], after the MLP
    q_norm: Tensor | None = None  # [D], or [H * D] over the whole projection
    k_norm: Tensor | None = None  # [D], or [Hkv * D] over the whole projection


_NORM_NAMES = {
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "post": {
        "post_attention_layernorm": "attention_out_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
}


class Linear(NamedTuple):
    """One linear module as the file and PEFT know it, as rows of a fused field."""

    module: str  # path below the layer, such as "self_attn.q_proj"
    field: str
    begin: int
    end: int
    in_features: int
    has_bias: bool


def linears(config: ModelConfig) -> list[Linear]:
    """List the linear modules of a layer."""
    E, F = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    total = config.qkv_features
    if config.fused_on_disk:
        inputs = [
            Linear("self_attn.qkv_proj", "qkv", 0, total, E, config.qkv_bias),
            Linear("mlp.gate_up_proj", "gate_up", 0, 2 * F, E, config.mlp_bias),
        ]
    else:
        inputs = [
            Linear("self_attn.q_proj", "qkv", 0, queries, E, config.qkv_bias),
            Linear("self_attn.k_proj", "qkv", queries, queries + keys, E, config.qkv_bias),
            Linear("self_attn.v_proj", "qkv", queries + keys, total, E, config.qkv_bias),
            Linear("mlp.gate_proj", "gate_up", 0, F, E, config.mlp_bias),
            Linear("mlp.up_proj", "gate_up", F, 2 * F, E, config.mlp_bias),
        ]
    return [
        *inputs,
        Linear("self_attn.o_proj", "o", 0, E, queries, config.o_bias),
        Linear("mlp.down_proj", "down", 0, E, F, config.mlp_bias),
    ]


def placements(config: ModelConfig) -> Iterator[Placement]:
    """List every tensor that a checkpoint of this config holds, layer by layer."""
    E, V = config.hidden_size, config.vocab_size
    yield Placement(EMBEDDING, OUTSIDE, "embedding", 0, V, (V, E))
    if not config.tie_word_embeddings:
        yield Placement(HEAD, OUTSIDE, "head", 0, V, (V, E))
    yield Placement(FINAL_NORM, OUTSIDE, "final_norm", 0, E, (E,))
    modules = linears(config)
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        for module, field, begin, end, inputs, has_bias in modules:
            shape = (end - begin, inputs)
            yield Placement(f"{prefix}{module}.weight", i, field, begin, end, shape)
            if has_bias:
                name = f"{prefix}{module}.bias"
                yield Placement(name, i, f"{field}_bias", begin, end, shape[:1])
        for name, field in _NORM_NAMES[config.norm_placement].items():
            yield Placement(f"{prefix}{name}.weight", i, field, 0, E, (E,))
        if config.qk_norm is not None:
            whole = config.qk_norm == "projection"
            for field, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
                size = config.head_dim * (heads if whole else 1)
                yield Placement(f"{prefix}self_attn.{field}.weight", i, field, 0, size, (size,))


class _HeadAsEmbedding:
    """A checkpoint that has its tied table under the name of the head alone."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.path = source.path
        self.names = tuple(EMBEDDING if name == HEAD else name for name in source.names)
        self.shapes = {EMBEDDING: source.shapes[HEAD], **source.shapes}
        self.dtypes = {EMBEDDING: source.dtypes[HEAD], **source.dtypes}
        del self.shapes[HEAD], self.dtypes[HEAD]

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        asked = self.names if names is None else names
        tensors = self._source.read([HEAD if name == EMBEDDING else name for name in asked])
        return {EMBEDDING if name == HEAD else name: t for name, t in tensors.items()}

    def config(self) -> dict[str, Any]:
        return self._source.config()


def checked(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Compare a checkpoint's tensors with its config, before any allocation.

    Returns:
        The source to read from, in which a tied table has the name of the embedding:
        ``safetensors.torch.save_model`` may keep the name of the head.

    Raises:
        CheckpointError: Names every kind of fault at once: tensors that are missing, unexpected,
            mis-shaped or not of a float dtype.
    """
    if config.tie_word_embeddings and HEAD in source.shapes and EMBEDDING not in source.shapes:
        source = _HeadAsEmbedding(source)
    expected = {place.name: place.shape for place in placements(config)}
    missing = [name for name in expected if name not in source.shapes]
    # a tied head may be in the file all the same
    expected.setdefault(HEAD, (config.vocab_size, config.hidden_size))
    # old versions of transformers saved a buffer
    unexpected = [n for n in source.names if n not in expected and not n.endswith(_BUFFER)]
    present = [name for name in expected if name in source.shapes]
    misshaped = [
        f"{name} is {list(source.shapes[name])}, expected {list(expected[name])}"
        for name in present
        if tuple(source.shapes[name]) != expected[name]
    ]
    mistyped = [
        f"{name} is {source.dtypes[name]}, expected {', '.join(_FLOATS)}"
        for name in present
        if source.dtypes[name] not in _FLOATS
    ]
    faults = [
        f"{kind}: {_some(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
            ("not of a float dtype", mistyped),
        )
        if names
    ]
    if HEAD in missing and len(missing) == 1:
        faults.append("tie_word_embeddings is false, so the head is needed")
    if faults:
        raise CheckpointError(
            f"{source.path}: tensors do not fit config.json ({config.architecture}); "
            + "; ".join(faults)
        )
    return source


def _some(names: list[str]) -> str:
    """List a few names; a name from the file may be long, or hold control characters."""
    shown = [n if n.isprintable() and len(n) < 160 else f"{n!r:.160}" for n in names[:_MAX_NAMED]]
    rest = len(names) - _MAX_NAMED
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


class Weights(NamedTuple):
    """All tensors of a decoder."""

    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    layers: list[Layer]


def allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """Make uninitialised weights in the fused layout."""
    sizes: dict[tuple[int, str], tuple[int, ...]] = {}
    for place in placements(config):
        # blocks of a field come in order, so the last one ends the field
        sizes[place.layer, place.field] = (place.end, *place.shape[1:])
    made = {key: torch.empty(shape, device=device, dtype=dtype) for key, shape in sizes.items()}
    layers = [
        Layer(**{field: t for (layer, field), t in made.items() if layer == i})
        for i in range(config.num_layers)
    ]
    embedding = made[OUTSIDE, "embedding"]
    head = made.get((OUTSIDE, "head"), embedding)
    return Weights(embedding, head, made[OUTSIDE, "final_norm"], layers)


def view(weights: Weights, place: Placement) -> Tensor:
    """Return the rows of a fused weight that hold one tensor of the file."""
    owner = weights if place.layer == OUTSIDE else weights.layers[place.layer]
    tensor: Tensor = getattr(owner, place.field)
    return tensor[place.begin : place.end]


def load(
    source: TensorSource, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Weights:
    """Read a checkpoint straight into fused weights, one layer at a time.

    Raises:
        CheckpointError: A tensor is missing, unexpected, mis-shaped or not of a float dtype, or a
            head that should be tied differs from the embedding.
    """
    source = checked(source, config)
    weights = allocate(config, device, dtype)
    by_layer: dict[int, list[Placement]] = {}
    for place in placements(config):
        by_layer.setdefault(place.layer, []).append(place)
    for places in by_layer.values():
        tensors = source.read([place.name for place in places])
        for place in places:
            view(weights, place).copy_(tensors.pop(place.name))
    check_tied(source, config, weights.embedding)
    return weights


def check_tied(source: TensorSource, config: ModelConfig, embedding: Tensor) -> None:
    """Refuse a head in the file that should be the ``embedding`` [V, E] and differs from it."""
    if config.tie_word_embeddings and HEAD in source.shapes:
        head = source.read([HEAD])[HEAD].to(embedding)
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{source.path}: {HEAD} differs from {EMBEDDING}, expected equal tensors as "
                "tie_word_embeddings is true; set it to false in config.json"
            )
