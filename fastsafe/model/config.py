"""Parses config.json by an allow-list: unknown architectures and absurd sizes are refused.

Nothing here imports torch, allocates by a size from the file, or runs anything it names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastsafe.errors import CheckpointError
from fastsafe.model.families import FAMILIES, Family
from fastsafe.model.json_fields import Fields
from fastsafe.model.rope_config import MAX_POSITIONS, RopeConfig, parse_rope

MAX_HIDDEN = 2**17
MAX_INTERMEDIATE = 2**19
MAX_LAYERS = 2**10
MAX_HEADS = 2**12
MAX_HEAD_DIM = 2**12
MAX_VOCAB = 2**22
MAX_PARAMETERS = 2**42

_FULL, _WINDOWED = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_CODE_FIELDS = ("auto_map", "trust_remote_code", "custom_pipelines", "attn_implementation")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and flags of a decoder.

    Sizes are in features, tokens or counts; every value has been checked.
    """

    architecture: str  # as config.json names it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # longest context the checkpoint claims
    norm_eps: float
    activation: str  # "silu" or "gelu_tanh"
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    fused_on_disk: bool  # qkv_proj and gate_up_proj are single tensors in the file
    norm_one_plus: bool  # norms multiply by 1 + weight
    norm_placement: str  # "pre", "post" or "both": where norms stand around a block
    qk_norm: str | None  # of each "head", of the whole "projection", or none
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logits_scale: float  # logits are divided by it
    windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included
    ropes: tuple[RopeConfig, ...]
    rope_of_layer: tuple[int, ...]  # per layer: index into ropes
    ignored: tuple[str, ...]  # fields that name code; never followed

    @property
    def qkv_features(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of weights, biases and norms left out."""
        heads = self.num_heads * self.head_dim
        mlp = 3 * self.intermediate_size * self.hidden_size
        layer = (self.qkv_features + heads) * self.hidden_size + mlp
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * self.hidden_size

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on its sequence's length (dynamic, longrope)."""
        return any(rope.depends_on_length for rope in self.ropes)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], location: str) -> "ModelConfig":
        """Parse a config.json in the spelling of transformers 4 or 5.

        Args:
            raw: The decoded object. Fields that are not known are not read; those that name
                code are listed in ``ignored``.
            location: Name of the file, for messages.

        Raises:
            CheckpointError: The architecture is unknown, the weights are quantized, or a field
                is missing, of a wrong type or out of range.
        """
        fields = Fields(raw, location)
        architecture, family = _family(fields)
        _refuse_unsupported(fields)
        hidden = fields.integer("hidden_size", 1, MAX_HIDDEN)
        heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        kv_default = None if family.kv_heads_required else heads
        kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, kv_default)
        if heads % kv_heads:
            raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        if not fields.has("head_dim") and family.head_dim is None and hidden % heads:
            raise fields.refuse("num_attention_heads", f"a divisor of hidden_size, {hidden}")
        head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, family.head_dim or hidden // heads)
        if head_dim % 2:
            raise fields.refuse("head_dim", "an even number")
        layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        windows = _windows(fields, family, layers)
        ropes = _ropes(fields, family, head_dim)
        attention_bias = fields.flag("attention_bias", False)
        scalar = fields.number("query_pre_attn_scalar", 1e-3, 1e6, 256.0)
        scale = (scalar if family.query_scalar else head_dim) ** -0.5
        multiplied = Fields(raw if family.reads_multipliers else {}, location)
        if family.reads_multipliers:
            scale = multiplied.number("attention_multiplier", 1e-6, 1e6, 1.0)
        config = cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer(
                "max_position_embeddings", 1, MAX_POSITIONS, family.max_positions
            ),
            norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, family.norm_eps),
            activation=_activation(fields, family),
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=family.reads_mlp_bias and fields.flag("mlp_bias", False),
            fused_on_disk=family.fused_on_disk,
            norm_one_plus=family.norm_one_plus,
            norm_placement=family.norm_placement,
            qk_norm=family.qk_norm,
            attention_scale=scale,
            attention_softcap=_softcap(
                fields,
                "attn_logit_softcapping",
                family.attention_softcap,
                known=family.attention_softcap is not None,
            ),
            logits_softcap=_softcap(
                fields, "final_logit_softcapping", family.logits_softcap, known=family.softcaps
            ),
            embedding_scale=(
                hidden**0.5
                if family.scales_embedding
                else multiplied.number("embedding_multiplier", 1e-6, 1e6, 1.0)
            ),
            residual_scale=multiplied.number("residual_multiplier", 1e-6, 1e6, 1.0),
            logits_scale=multiplied.number("logits_scaling", 1e-6, 1e6, 1.0),
            windows=windows,
            ropes=ropes,
            rope_of_layer=tuple(int(len(ropes) == 2 and w is not None) for w in windows),
            ignored=_code_fields(raw),
        )
        if config.num_parameters > MAX_PARAMETERS:
            raise CheckpointError(
                f"{location}: hidden_size, num_hidden_layers and the other sizes make "
                f"{config.num_parameters} parameters, expected at most {MAX_PARAMETERS}"
            )
        return config


def _family(fields: Fields) -> tuple[str, Family]:
    names = fields.raw.get("architectures")
    model_type = fields.raw.get("model_type")
    if names in (None, []):
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
        if not names:
            types = ", ".join(family.model_type for family in FAMILIES.values())
            raise fields.refuse("model_type", f"one of {types}, or a known architecture")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.refuse("architectures", "a list of one name")
    name = names[0]
    family = FAMILIES.get(name)
    if name == "Gemma3ForConditionalGeneration":
        raise CheckpointError(
            f"{fields.location}: architectures is {name}, which also reads images, expected its "
            "text part alone; save the language model as Gemma3ForCausalLM"
        )
    if family is None:
        raise CheckpointError(
            f"{fields.location}: architectures is {name[:60]!r}, expected one of "
            f"{', '.join(FAMILIES)}; audit and generate run others with --backend transformers, "
            "train and verify do not"
        )
    if model_type is not None and model_type != family.model_type:
        raise fields.refuse("model_type", f"{family.model_type} for {name}")
    return name, family


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse what would change the computation in a way the decoder does not know."""
    if fields.has("quantization_config"):
        section = fields.section("quantization_config")
        method = section.raw.get("quant_method") if section is not None else None
        raise CheckpointError(
            f"{fields.location}: quantization_config asks for {str(method)[:60]!r} weights, "
            "expected plain float32, bfloat16 or float16; use the unquantized checkpoint, or "
            "delete the field if the weights are plain, as a merge to 16 bits leaves them"
        )
    for name in ("is_encoder_decoder", "use_bidirectional_attention", "add_cross_attention"):
        if fields.flag(name, False):
            raise fields.refuse(name, "false: only causal decoders are known")
    if not fields.flag("is_causal", True):
        raise fields.refuse("is_causal", "true: only causal decoders are known")


def _activation(fields: Fields, family: Family) -> str:
    name = family.activation_field
    # Gemma's first configs say "gelu" and mean the tanh approximation
    if family.model_type == "gemma" and fields.raw.get(name) == "gelu":
        return "gelu_tanh"
    return _ACTIVATIONS[fields.choice(name, tuple(_ACTIVATIONS), family.activation)]


def _softcap(fields: Fields, name: str, default: float | None, *, known: bool) -> float | None:
    if known:
        return fields.optional(name, 1e-3, 1e6, default)
    if fields.has(name):
        raise fields.refuse(name, "null for this architecture")
    return None


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """Read the window of every layer."""
    kinds = fields.words("layer_types", layers, (_FULL, _WINDOWED))
    window: int | None = None
    if family.window is not None and "sliding_window" in fields.raw:
        if fields.has("sliding_window"):
            window = fields.integer("sliding_window", 1, MAX_POSITIONS)
    else:
        window = family.window_default
    if family.window_opt_in and not fields.flag("use_sliding_window", False):
        window = None
    if family.window != "layer_types":
        kind = _FULL if window is None else _WINDOWED
        if kinds is not None and set(kinds) != {kind}:
            # transformers takes Mistral with layer_types for another architecture
            raise fields.refuse("layer_types", f"{kind} for all layers of this config")
        return (window,) * layers
    if kinds is None and family.window_pattern is not None:
        n = family.window_pattern
        if n != 2:
            n = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, n)
        kinds = tuple(_WINDOWED if (i + 1) % n else _FULL for i in range(layers))
    elif kinds is None:
        first = fields.integer("max_window_layers", 0, MAX_POSITIONS, 28)
        opened = window is not None
        kinds = tuple(_WINDOWED if opened and i >= first else _FULL for i in range(layers))
    if window is None and _WINDOWED in kinds:
        raise fields.refuse("sliding_window", "a number of tokens, as layer_types has windows")
    return tuple(window if kind == _WINDOWED else None for kind in kinds)


def _ropes(fields: Fields, family: Family, head_dim: int) -> tuple[RopeConfig, ...]:
    """Read the rotary embedding, or two: of full layers, then of windowed ones."""
    parse = partial(
        parse_rope,
        fields,
        head_dim=head_dim,
        phi3=family.partial_rotary,
        default_positions=family.max_positions,
    )
    empty = Fields({}, fields.location)
    scaling = fields.section("rope_scaling") or empty
    section = fields.section("rope_parameters") or empty
    if family.local_theta is None:
        section = scaling if scaling.raw else section
        if _is_nested(section):
            raise CheckpointError(
                f"{section.location} holds layer types, expected one rotary embedding for all "
                "layers of this architecture"
            )
        return (parse(section, default_theta=family.default_theta),)
    # transformers ignores these spellings without a word
    if section.raw and not _is_nested(section):
        raise fields.refuse("rope_parameters", f"an object with {_FULL} and {_WINDOWED}")
    if scaling.raw and (_is_nested(scaling) or not scaling.has("rope_type")):
        raise fields.refuse("rope_scaling", f"an object with rope_type, for the {_FULL} layers")
    full = section.section(_FULL) or empty
    local = section.section(_WINDOWED) or empty
    if scaling.raw:
        full = Fields({**full.raw, **scaling.raw}, scaling.location)
    return (
        parse(full, default_theta=family.default_theta),
        parse(local, default_theta=family.local_theta, theta_name="rope_local_base_freq"),
    )


def _is_nested(section: Fields) -> bool:
    return any(section.has(kind) for kind in (_FULL, _WINDOWED))


def _code_fields(raw: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(k for k in raw if k in _CODE_FIELDS or k.startswith("_attn_implementation"))
