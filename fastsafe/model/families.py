"""The known architectures, as flags of one decoder."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Family:
    """Fixed traits of an architecture, and the defaults of fields its config may leave out."""

    model_type: str
    models: str = ""  # names of some that have it, for lists
    norm_placement: str = "pre"  # norms stand before a block, after it ("post"), or "both"
    norm_one_plus: bool = False  # norms multiply by 1 + weight
    qk_norm: str | None = None  # of each "head", or of the whole "projection"
    qkv_bias: bool | None = False  # None: as attention_bias says
    o_bias: bool | None = False  # None: as attention_bias says
    reads_mlp_bias: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"  # default, as transformers spells it
    fused_on_disk: bool = False  # qkv_proj and gate_up_proj are single tensors
    scales_embedding: bool = False  # by sqrt(hidden_size)
    reads_multipliers: bool = False  # Granite's four
    query_scalar: bool = False  # query_pre_attn_scalar replaces head_dim in the scale
    softcaps: bool = False  # reads final_logit_softcapping
    attention_softcap: float | None = None  # default; None: the architecture has none
    logits_softcap: float | None = None  # default; None: off
    partial_rotary: bool = False
    tied: bool = False  # default of tie_word_embeddings
    head_dim: int | None = None  # default; None: hidden_size / num_heads
    kv_heads_required: bool = False  # the default of num_key_value_heads is not num_heads
    window: str | None = None  # "all" layers, those of "layer_types", or none
    window_default: int | None = None  # where the config does not say
    window_opt_in: bool = False  # only with use_sliding_window
    window_pattern: int | None = None  # every n-th layer is full; None: from max_window_layers on
    local_theta: float | None = None  # windowed layers have a rotary base of their own
    default_theta: float = 10_000.0
    norm_eps: float = 1e-6  # default
    max_positions: int = 2048  # default


_GEMMA = Family(
    model_type="gemma",
    models="Gemma 1",
    norm_one_plus=True,
    qkv_bias=None,
    o_bias=None,
    activation="gelu_pytorch_tanh",
    scales_embedding=True,
    tied=True,
    head_dim=256,
    kv_heads_required=True,
    max_positions=8192,
)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    models="Gemma 2",
    norm_placement="both",
    activation_field="hidden_activation",
    query_scalar=True,
    softcaps=True,
    attention_softcap=50.0,
    logits_softcap=30.0,
    window="layer_types",
    window_default=4096,
    window_pattern=2,
)

FAMILIES = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        models="Llama 1 to 3.3, SmolLM2, TinyLlama, Vicuna",
        qkv_bias=None,
        o_bias=None,
        reads_mlp_bias=True,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        models="Mistral 7B, Mistral NeMo, Ministral",
        kv_heads_required=True,
        window="all",
        window_default=4096,
        max_positions=131_072,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        models="Qwen1.5, Qwen2, Qwen2.5, QwQ",
        qkv_bias=True,
        kv_heads_required=True,
        window="layer_types",
        window_default=4096,
        window_opt_in=True,
        max_positions=32_768,
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        models="Qwen3 without experts",
        qk_norm="head",
        qkv_bias=None,
        o_bias=None,
        kv_heads_required=True,
        head_dim=128,
        window="layer_types",
        window_default=4096,
        window_opt_in=True,
        max_positions=32_768,
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": replace(
        _GEMMA2,
        model_type="gemma3_text",
        models="Gemma 3 270M and 1B, the text parts of larger ones",
        qk_norm="head",
        attention_softcap=None,
        logits_softcap=None,
        window_pattern=6,
        local_theta=10_000.0,
        default_theta=1_000_000.0,
        max_positions=131_072,
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        models="Phi-3, Phi-3.5-mini, Phi-4",
        fused_on_disk=True,
        partial_rotary=True,
        window="all",
        norm_eps=1e-5,
        max_positions=4096,
    ),
    "GraniteForCausalLM": Family(
        model_type="granite",
        models="Granite 3 without experts",
        qkv_bias=None,
        o_bias=None,
        reads_mlp_bias=True,
        reads_multipliers=True,
    ),
    "Olmo2ForCausalLM": Family(
        model_type="olmo2",
        models="OLMo 2",
        norm_placement="post",
        qk_norm="projection",
        qkv_bias=None,
        o_bias=None,
        norm_eps=1e-5,
    ),
}
