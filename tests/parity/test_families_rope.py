"""Every rotary scaling equals transformers, within and beyond the original context length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastsafe.errors import UsageError
from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.rope import frequencies
from fastsafe.model.transformer import Transformer

Build = Callable[..., Any]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn-fractional": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn-factor": YARN | {"attention_factor": 1.3},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 1.5 * i for i in range(8)],
        "original_max_position_embeddings": 32,
    },
}
LENGTHS = (20, 31, 64, 65, 150)  # around and beyond 32 and 64


def ids_of(length: int) -> Tensor:
    return torch.randint(128, (length,), generator=torch.Generator().manual_seed(length))


def logits_of(model: Transformer, sequences: list[Tensor]) -> list[Tensor]:
    lengths = [len(s) for s in sequences]
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model.forward(torch.cat(sequences), positions, PackedAttention(lengths))
    return list(model.logits(hidden).split(lengths))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("scaling", SCALINGS)
@torch.no_grad()
def test_logits_equal_transformers_at_any_length(scaling: str, build: Build) -> None:
    parameters = SCALINGS[scaling] | {"rope_theta": 10_000.0}
    pair = build("llama2", max_position_embeddings=64, rope_parameters=parameters)
    for length in LENGTHS:
        ids = ids_of(length)
        # a short sequence resets the frequencies that transformers grew for a longer one
        pair.reference(ids_of(8)[None])
        want = pair.reference(ids[None]).logits[0]
        [got] = logits_of(pair.model, [ids])
        assert error(got, want) < 1e-4, length


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
@torch.no_grad()
def test_a_sequence_is_rotated_by_its_own_length_alone(scaling: str, build: Build) -> None:
    parameters = SCALINGS[scaling] | {"rope_theta": 10_000.0}
    model = build("llama2", max_position_embeddings=64, rope_parameters=parameters).model
    sequences = [ids_of(n) for n in LENGTHS]
    for got, ids in zip(logits_of(model, sequences), sequences, strict=True):
        [alone] = logits_of(model, [ids])
        assert error(got, alone) < 1e-5


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
@torch.no_grad()
def test_rows_that_are_not_whole_sequences_need_their_lengths(scaling: str, build: Build) -> None:
    parameters = SCALINGS[scaling] | {"rope_theta": 10_000.0}
    model = build("llama2", max_position_embeddings=64, rope_parameters=parameters).model
    ids, positions = ids_of(40), torch.arange(40)
    whole = model.forward(ids, positions, PackedAttention([40]))
    told = torch.full((40,), 40)
    hidden = model.forward(ids, positions, PackedAttention([40]), context_lens=told)
    assert torch.equal(hidden, whole)
    for partial in (positions + 1, positions[[3, 2, 1]], torch.tensor([0, 2])):
        with pytest.raises(UsageError, match="context_lens is missing"):
            model.forward(ids[: len(partial)], partial, PackedAttention([len(partial)]))


# fields of published checkpoints that decide the rotation
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "Llama",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 131_072,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "Qwen2.5-7B with yarn": (
        "Qwen2",
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32_768,
                "type": "yarn",
            },
        },
    ),
    "vicuna-7b-v1.5-16k": (
        "Llama",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
    ),
    "Phi-4-mini": (
        "Phi3",
        {
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + i for i in range(48)],
                "type": "longrope",
            },
        },
    ),
    "Phi-3-mini-128k": (
        "Phi3",
        {
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "short_factor": [1.05] * 48,
                "long_factor": [1.03 + i for i in range(48)],
                "type": "longrope",
            },
        },
    ),
}


def test_phi3_takes_its_original_length_from_the_whole_config() -> None:
    for outside in ({}, {"original_max_position_embeddings": 2048}):
        fields = PUBLISHED["Phi-3-mini-128k"][1]
        scaling = fields["rope_scaling"] | {"original_max_position_embeddings": 1000}
        fields = fields | {"rope_scaling": scaling, "original_max_position_embeddings": None}
        fields = {k: v for k, v in (fields | outside).items() if v is not None}
        oracle = transformers.Phi3Config(**(fields | {"rope_scaling": dict(scaling)}))
        raw = {"architectures": ["Phi3ForCausalLM"], "vocab_size": 9, "intermediate_size": 64}
        raw |= {"num_hidden_layers": 2, "num_key_value_heads": 4} | fields
        [rope] = ModelConfig.from_json(raw, "config.json").ropes
        want = oracle.rope_parameters["original_max_position_embeddings"]
        assert rope.original_max_positions == want


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_of_published_configs(name: str) -> None:
    prefix, fields = PUBLISHED[name]
    oracle = getattr(transformers, f"{prefix}Config")(**fields)
    kind = oracle.rope_parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS[kind]
    want, want_scale = compute(oracle, None)
    sizes = {
        "vocab_size": 100,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
    }
    raw = {"architectures": [f"{prefix}ForCausalLM"]} | sizes | fields
    [rope] = ModelConfig.from_json(raw, "config.json").ropes
    if prefix == "Phi3":  # its first release wrote "su", which transformers no longer reads
        raw["rope_scaling"] = raw["rope_scaling"] | {"type": "su"}
        assert ModelConfig.from_json(raw, "config.json").ropes == (rope,)
    torch.testing.assert_close(frequencies(rope), want, rtol=1e-6, atol=0.0)
    assert rope.attention_factor == pytest.approx(want_scale, rel=1e-9)
    if kind == "longrope":
        want_long, _ = compute(oracle, None, seq_len=rope.original_max_positions + 1)
        torch.testing.assert_close(frequencies(rope, long=True), want_long, rtol=1e-6, atol=0.0)
