import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsafe.errors import CheckpointError
from fastsafe.model.config import ModelConfig
from fastsafe.model.families import FAMILIES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden 2^40": ({"hidden_size": 2**40}, "hidden_size is 1099511627776, expected an integer"),
    "hidden 0": ({"hidden_size": 0}, "hidden_size is 0"),
    "hidden negative": ({"hidden_size": -64}, "hidden_size is -64"),
    "hidden missing": ({"hidden_size": None}, "hidden_size is missing"),
    "hidden text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "hidden fraction": ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
    "hidden true": ({"hidden_size": True}, "hidden_size is True"),
    "hidden of many digits": ({"hidden_size": 10**5000}, "hidden_size is an integer of 16610 bits"),
    "layers 1e9": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "vocabulary 2^31": ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
    "intermediate 2^40": ({"intermediate_size": 2**40}, "intermediate_size is"),
    "heads 0": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads 2^20": ({"num_attention_heads": 2**20}, "num_attention_heads is 1048576"),
    "heads do not divide": (
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        "num_attention_heads is 5, expected a divisor of hidden_size",
    ),
    "kv heads 0": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3, .*divisor"),
    "head_dim odd": ({"head_dim": 15}, "head_dim is 15, expected an even number"),
    "head_dim 2^30": ({"head_dim": 2**30}, "head_dim is 1073741824"),
    "positions 2^62": ({"max_position_embeddings": 2**62}, "max_position_embeddings is 46116860"),
    "not causal": ({"is_causal": False}, "is_causal is False, expected true: only causal decoders"),
    "theta NaN": ({"rope_theta": math.nan}, "rope_theta is nan"),
    "theta infinite": ({"rope_theta": math.inf}, "rope_theta is inf"),
    "theta 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "theta beyond floats": ({"rope_theta": 10**400}, "rope_theta is an integer of"),
    "eps NaN": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "eps negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    "activation": ({"hidden_act": "os.system"}, "hidden_act is 'os.system', expected one of silu"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or"),
    "all sizes at once": (
        {"hidden_size": 2**17, "intermediate_size": 2**19, "num_hidden_layers": 1024},
        r"make 2\d* parameters, expected at most 4398046511104",
    ),
    "rope is text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
    "rope of an unknown kind": ({"rope_scaling": {"type": "ntk"}}, "type is 'ntk', expected one"),
    "rope per layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters holds layer types",
    ),
    "rope factor missing": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope factor NaN": ({"rope_scaling": {"type": "dynamic", "factor": math.nan}}, "factor is nan"),
    "rope factor 0": ({"rope_scaling": YARN | {"factor": 0}}, "factor is 0"),
    "rope original 0": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0",
    ),
    "rope attention factor": (
        {"rope_scaling": YARN | {"attention_factor": math.inf}},
        "attention_factor is inf",
    ),
    "rope frequencies crossed": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "high_freq_factor is 1.0, expected more than low_freq_factor",
    ),
    "rope list too short": (
        {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}},
        "long_factor is a list of 7, expected a list of 8 numbers",
    ),
    "rope list of zeros": (
        {"rope_scaling": LONGROPE | {"short_factor": [0.0] * 8}},
        "short_factor",
    ),
    "rope list of text": ({"rope_scaling": LONGROPE | {"short_factor": ["1"] * 8}}, "short_factor"),
    "part of a head": (
        {"partial_rotary_factor": 0.5},
        r"partial_rotary_factor is 0\.5, .*1\.0 for",
    ),
    "layer types differ": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .*sliding_attention.*, expected full_attention for all layers",
    ),
    "layer types of another length": (
        {"layer_types": ["full_attention"] * 3},
        "layer_types is .*, expected a list of 2 of",
    ),
    "softcap of another family": (
        {"final_logit_softcapping": 30.0},
        "final_logit_softcapping is 30.0, expected null",
    ),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is True, expected false"),
    "bidirectional": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config asks for 'gptq' weights",
    ),
    "quantized by a list": ({"quantization_config": [1]}, "quantization_config is .1., expected"),
    "unknown architecture": (
        {"architectures": ["EvilForCausalLM"]},
        "architectures is 'EvilForCausalLM', expected one of LlamaForCausalLM, Mistral",
    ),
    "two architectures": (
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
        "architectures is .*Llama.*, expected a list of one name",
    ),
    "architecture is text": ({"architectures": "LlamaForCausalLM"}, "expected a list of one name"),
    "images": (
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        "which also reads images, expected its text part alone",
    ),
    "model type of another": ({"model_type": "phi3"}, "model_type is 'phi3', expected llama"),
    "neither name": (
        {"architectures": None, "model_type": "rwkv"},
        "model_type is 'rwkv', expected one of llama, mistral",
    ),
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_json(LLAMA | changes, "config.json")


@pytest.mark.parametrize("name", BOMBS)
def test_refuses_before_anything_is_allocated(name: str) -> None:
    changes, message = BOMBS[name]
    with pytest.raises(CheckpointError, match=r"^config\.json.*" + message) as caught:
        parse(**changes)
    assert len(str(caught.value)) < 500


def test_windows_need_a_size() -> None:
    raw = {"architectures": ["Gemma2ForCausalLM"], "model_type": None, "sliding_window": None}
    with pytest.raises(CheckpointError, match="sliding_window is missing, expected a number of t"):
        parse(**raw)


def test_null_and_absent_differ_where_transformers_has_a_default() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert parse(**mistral).windows == (4096, 4096)
    assert parse(**mistral, sliding_window=None).windows == (None, None)
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    assert parse(**gemma).attention_softcap == 50.0
    assert parse(**gemma, attn_logit_softcapping=None).attention_softcap is None


def test_fields_that_name_code_are_reported_and_not_followed() -> None:
    code = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
    }
    config = parse(**code)
    assert config.ignored == tuple(code)
    assert parse().ignored == ()


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bf16", "auto", "half", None, 7, ["x"]])
def test_dtype_of_the_config_is_not_read(dtype: Any) -> None:
    assert parse(torch_dtype=dtype) == parse(dtype=dtype) == parse()


def test_positions_left_to_the_architectures_default() -> None:
    names = {"max_position_embeddings": None, "architectures": None}
    found = {t: parse(**names, model_type=t).max_position_embeddings for t in ("llama", "gemma")}
    assert found == {"llama": 2048, "gemma": 8192}


def test_layer_types_that_contradict_the_window() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    windowed, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert parse(**mistral, layer_types=windowed).windows == (4096, 4096)
    with pytest.raises(CheckpointError, match="expected sliding_attention for all layers"):
        parse(**mistral, layer_types=full)
    assert parse(**mistral, layer_types=full, sliding_window=None).windows == (None, None)
    with pytest.raises(CheckpointError, match="expected full_attention for all layers"):
        parse(layer_types=windowed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "linear", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 100.0}),
        ("rope_scaling", {"type": "linear", "factor": 8.0}),
        ("rope_scaling", {"full_attention": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_rope_of_gemma3_in_spellings_that_transformers_ignores(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{field} is .*, expected an object with"):
        parse(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", **{field: value})


def test_model_type_alone_names_the_architecture() -> None:
    for names in (None, []):
        config = parse(architectures=names, model_type="gemma3_text")
        assert config.architecture == "Gemma3ForCausalLM"
    assert {"LlamaForCausalLM", "Phi3ForCausalLM"} <= set(FAMILIES)


def test_counts_parameters() -> None:
    # q, k, v, o, three of the MLP, in two layers; embedding and head
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert parse().num_parameters == 2 * layer + 2 * 128 * 64
    assert parse(tie_word_embeddings=True).num_parameters == 2 * layer + 128 * 64


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 1, 2, 64, 1e4, 2**62, 10**400, "linear", "yarn", "longrope", "dynamic"])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(st.sampled_from([*LONGROPE, *YARN, *LLAMA3, "rope_theta"]), inner)
    ),
    max_leaves=12,
)
FIELDS = [
    *LLAMA,
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "head_dim",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attention_multiplier",
    "quantization_config",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
def test_any_json_is_parsed_or_refused(name: str, changes: dict[str, Any]) -> None:
    raw = LLAMA | {"architectures": [name], "model_type": None} | changes
    try:
        config = ModelConfig.from_json(raw, "config.json")
    except CheckpointError as refusal:
        message = str(refusal)
        assert message.startswith("config.json")
        return
    assert len(config.windows) == len(config.rope_of_layer) == config.num_layers
    assert all(0 < rope.rotary_dim <= config.head_dim for rope in config.ropes)
