from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe.errors import CheckpointError
from fastsafe.model import weights
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import Transformer

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Fake:
    """A checkpoint in memory."""

    path = Path("model")

    def __init__(self, tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        self.tensors = tensors
        self.raw = raw
        self.names = tuple(tensors)
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        spelled = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
        self.dtypes = {name: spelled[t.dtype] for name, t in tensors.items()}

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names or self.names}

    def config(self) -> dict[str, Any]:
        return self.raw


def tensors_of(raw: dict[str, Any]) -> dict[str, Tensor]:
    config = ModelConfig.from_json(raw, "config.json")
    generator = torch.Generator().manual_seed(0)
    return {p.name: torch.randn(p.shape, generator=generator) for p in weights.placements(config)}


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were allocated before the checkpoint was checked")

    monkeypatch.setattr(weights, "allocate", refuse)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_every_tensor_into_its_place(tied: bool, dtype: torch.dtype) -> None:
    raw = RAW | {"tie_word_embeddings": tied, "attention_bias": True}
    tensors = tensors_of(raw)
    model = Transformer.load(Fake(tensors, raw), dtype=dtype)
    assert model.dtype == dtype
    assert model.tensors().keys() == tensors.keys()
    for name, tensor in model.tensors().items():
        assert torch.equal(tensor, tensors[name].to(dtype)), name
    assert ("lm_head.weight" in tensors) is not tied
    assert model.layers[0].qkv.shape == (32, 16)
    assert model.layers[1].gate_up.shape == (48, 16)


@pytest.mark.usefixtures("no_allocation")
def test_names_all_faults_at_once() -> None:
    tensors = tensors_of(RAW)
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(8, 16, dtype=torch.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)
    with pytest.raises(CheckpointError) as caught:
        Transformer.load(Fake(tensors, RAW))
    assert str(caught.value) == (
        "model: tensors do not fit config.json (LlamaForCausalLM); "
        "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight; "
        "unexpected: model.layers.2.mlp.up_proj.weight; "
        "mis-shaped: model.layers.0.self_attn.k_proj.weight is [16, 16], expected [8, 16]; "
        "not of a float dtype: model.layers.0.self_attn.v_proj.weight is I8, expected F32, BF16, "
        "F16, F64"
    )


@pytest.mark.usefixtures("no_allocation")
def test_a_head_is_needed_where_it_is_not_tied() -> None:
    tensors = tensors_of(RAW)
    del tensors["lm_head.weight"]
    with pytest.raises(
        CheckpointError, match=r"missing: lm_head\.weight; tie_word_embeddings is f"
    ):
        Transformer.load(Fake(tensors, RAW))


@pytest.mark.usefixtures("no_allocation")
def test_a_config_of_another_size_is_named_tensor_by_tensor() -> None:
    tensors = tensors_of(RAW)
    with pytest.raises(CheckpointError, match=r"mis-shaped: .*q_proj.weight is .* and \d+ more$"):
        Transformer.load(Fake(tensors, RAW | {"hidden_size": 32}))


@pytest.mark.usefixtures("no_allocation")
def test_hostile_names_are_shown_short_and_escaped() -> None:
    tensors = tensors_of(RAW) | {"a\x1b[2J": torch.zeros(1), "b" * 10_000: torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        Transformer.load(Fake(tensors, RAW))
    assert "'a\\x1b[2J'" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_buffers_of_old_checkpoints_are_passed_over() -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    with_buffers = Transformer.load(Fake(tensors_of(RAW) | extra, RAW)).tensors()
    plain = Transformer.load(Fake(tensors_of(RAW), RAW)).tensors()
    assert with_buffers.keys() == plain.keys()
    assert all(torch.equal(with_buffers[name], plain[name]) for name in plain)
