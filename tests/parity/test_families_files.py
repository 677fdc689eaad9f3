"""Checkpoint files in all their spellings: shards, tied heads, configs of transformers 4."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import weights as w
from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import Transformer

Build = Callable[..., Any]
ONE_EACH = ["llama2", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "olmo2"]
IDS = torch.arange(30) * 7 % 128


@torch.no_grad()
def relative_error(reference: Any, model: Transformer) -> float:
    want = reference(IDS[None]).logits[0]
    hidden = model.forward(IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)]))
    return float((model.logits(hidden) - want).norm() / want.norm())


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_in_shards(family: str, tied: bool, build: Build) -> None:
    pair = build(family, shard="40KB", tie_word_embeddings=tied)
    assert len(list(pair.path.glob("*.safetensors"))) > 3
    assert (pair.model.head is pair.model.embedding) == tied
    assert relative_error(pair.reference, pair.model) < 1e-4


@pytest.mark.parametrize("family", ONE_EACH)
def test_what_is_saved_transformers_loads(family: str, build: Build, tmp_path: Path) -> None:
    pair = build(family)
    weights = {name: t.contiguous() for name, t in pair.model.tensors().items()}
    stored = pair.reference.state_dict()
    assert set(weights) == {n for n in stored if n != "lm_head.weight" or n in weights}
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())
    out = tmp_path / "saved"
    out.mkdir()
    safetensors.write(out / "model.safetensors", weights, {"format": "pt"})
    (out / "config.json").write_text((pair.path / "config.json").read_text())
    again = type(pair.reference).from_pretrained(out)
    assert relative_error(again, pair.model) < 1e-4


@pytest.mark.parametrize("family", ONE_EACH)
def test_slots_are_the_linear_modules_that_peft_sees(family: str, build: Build) -> None:
    pair = build(family)
    modules = {
        name: module
        for name, module in pair.reference.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    slots = pair.model.slots()
    assert set(slots) == set(modules)
    for name, slot in slots.items():
        fused = pair.model.weight(slot.layer, slot.name)
        assert slot.in_features == fused.shape[1]
        assert torch.equal(fused[slot.begin : slot.end], modules[name].weight)


def old_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a config of transformers 5 as transformers 4 wrote it."""
    old = {k: v for k, v in raw.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    rope = raw["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        old["sliding_window_pattern"] = 3
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = scaling.pop("rope_type")
    scaling["rope_type" if "rope_local_base_freq" in old else "type"] = kind
    old["rope_scaling"] = None if kind == "default" else scaling
    return old | {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    "family", [*ONE_EACH, "llama3", "mistral", "qwen2-window", "phi3-longrope"]
)
def test_configs_of_transformers_4_mean_the_same(family: str, build: Build) -> None:
    path = build(family).path / "config.json"
    raw = json.loads(path.read_text())
    new = ModelConfig.from_json(raw, "new")
    assert ModelConfig.from_json(old_spelling(raw), "old") == new


@pytest.mark.parametrize("prefix", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3"])
def test_windows_of_layers_left_to_their_defaults(prefix: str) -> None:
    oracle = getattr(transformers, f"{prefix}Config")(num_hidden_layers=30)
    name = "Gemma3ForCausalLM" if prefix == "Gemma3Text" else f"{prefix}ForCausalLM"
    raw = {
        "architectures": [name],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    windows = ModelConfig.from_json(raw, "config.json").windows
    kinds = getattr(oracle, "layer_types", None) or ["sliding_attention"] * 30
    window = oracle.sliding_window
    assert windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)


def test_a_tied_head_in_the_file_must_equal_the_embedding(build: Build, tmp_path: Path) -> None:
    pair = build("llama3")
    weights = {name: t.contiguous() for name, t in pair.model.tensors().items()}
    for head, fits in ((pair.model.head.clone(), True), (pair.model.head + 1, False)):
        out = tmp_path / f"tied-{fits}"
        out.mkdir()
        safetensors.write(out / "model.safetensors", weights | {"lm_head.weight": head})
        (out / "config.json").write_text((pair.path / "config.json").read_text())
        if fits:
            assert relative_error(pair.reference, Transformer.load(Checkpoint(out))) < 1e-4
        else:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
                Transformer.load(Checkpoint(out))


def test_a_tied_table_under_the_name_of_the_head(build: Build, tmp_path: Path) -> None:
    pair = build("llama3")
    out = tmp_path / "head"
    out.mkdir()
    tables = {
        "lm_head.weight" if k == w.EMBEDDING else k: t for k, t in pair.model.tensors().items()
    }
    safetensors.write(out / "model.safetensors", tables, {"format": "pt"})
    (out / "config.json").write_text((pair.path / "config.json").read_text())
    theirs = type(pair.reference).from_pretrained(out)
    assert relative_error(pair.reference, Transformer.load(Checkpoint(out))) < 1e-4
    assert relative_error(theirs, pair.model) < 1e-4
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        Transformer.load(Checkpoint(out))


def test_an_index_with_stale_metadata_and_a_tied_head(build: Build) -> None:
    pair = build("llama3", shard="40KB")
    path = pair.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] = "123"
    index["weight_map"]["lm_head.weight"] = index["weight_map"][w.EMBEDDING]
    path.write_text(json.dumps(index))
    theirs = type(pair.reference).from_pretrained(pair.path)
    assert relative_error(theirs, Transformer.load(Checkpoint(pair.path))) < 1e-4
