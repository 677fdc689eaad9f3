"""Adapter directories: what is refused, by name and whole; and the bank's slots."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe.errors import AdapterError
from fastsafe.io import safetensors
from fastsafe.model import Adapter, AdapterBank, ModelConfig, Transformer
from fastsafe.model.lora import LoraWeights
from fastsafe.model.peft import parse_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MINIMAL = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture
def model() -> Transformer:
    return Transformer.random(ModelConfig.from_json(LLAMA, "test"))


@pytest.fixture
def write(model: Transformer, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter directory: ``write(tensors=changed, **config)``."""

    def make(tensors: Callable[[dict[str, Any]], Any] | None = None, **config: Any) -> Path:
        path = tmp_path / "adapter"
        path.mkdir()
        settings = MINIMAL | config
        (path / "adapter_config.json").write_text(json.dumps(settings))
        found = {}
        for module, slot in model.slots().items():
            if module.endswith(("q_proj", "up_proj")):
                key = f"base_model.model.{module}"
                found[f"{key}.lora_A.weight"] = torch.ones(2, slot.in_features)
                found[f"{key}.lora_B.weight"] = torch.ones(slot.end - slot.begin, 2)
        if tensors:
            tensors(found)
        safetensors.write(path / "adapter_model.safetensors", found)
        return path

    return make


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_minimal_config_loads(model: Transformer, write: Callable[..., Path]) -> None:
    adapter = Adapter.load(write(), model.slots())
    assert adapter.name == "adapter"
    assert len(adapter.weights) == 4
    assert {w.scaling for w in adapter.weights.values()} == {2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), r"layers\.0\.self_attn\.q_proj\.lora_A\.weight' is missing"),
        (lambda t: t.update({FIRST: torch.ones(2, 15)}), r"is \[2, 15\], expected \[2, 16\]"),
        (lambda t: t.update({FIRST: torch.ones(3, 16)}), r"is \[3, 16\], expected \[2, 16\]"),
        (
            lambda t: t.update({FIRST.replace("q_proj", "k_proj"): torch.ones(2, 16)}),
            "1 unexpected tensors .*k_proj",
        ),
        (
            lambda t: t.update({"model.x": torch.ones(1)}),
            "tensor 'model.x' is unexpected beside the LoRA weights",
        ),
        (
            lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}),
            "is torch.int8, expected float32, bfloat16 or float16",
        ),
        (
            lambda t: t.update({FIRST.replace("lora_A", "lora_A.default"): t[FIRST]}),
            r"holds weights of 2 adapters \('default', None\), expected one",
        ),
        (
            lambda t: t.update({FIRST.removeprefix("base_model.model."): t[FIRST] + 1}),
            "two tensors have one name but for its prefix",
        ),
        (
            lambda t: t.update({FIRST.replace("lora_A.weight", "lora_B.bias"): torch.ones(16)}),
            "is a trained bias, which is not supported; merge the adapter",
        ),
        (
            lambda t: t.update(
                {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}
            ),
            "is a magnitude of DoRA",
        ),
    ],
)
def test_partial_and_mis_shaped_adapters_are_refused_whole(
    model: Transformer, write: Callable[..., Path], change: Any, message: str
) -> None:
    bank = AdapterBank(model)
    with pytest.raises(AdapterError, match=message):
        bank.load(write(change))
    assert bank.names == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "some"}, "bias is 'some', expected 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "'OLoRA', .* convert the adapter to plain LoRA"),
        ({"init_lora_weights": "kaiming"}, "init_lora_weights is 'kaiming', expected true, false"),
        ({"kasa_config": {}}, "kasa_config is {}, which is not supported"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_new_feature": "on"}, "some_new_feature is 'on', which is not supported"),
        ({"layers_pattern": "h", "layers_to_transform": 0}, "layers_pattern is 'h'"),
        ({"r": 0}, r"r is 0, expected an integer in \[1, 4096\]"),
        ({"r": -2}, "r is -2"),
        ({"r": True}, "r is True"),
        ({"r": 1 << 40}, "r is 1099511627776"),
        ({"lora_alpha": float("nan")}, "NaN|lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha is an integer of 1329 bits, expected a finite"),
        ({"alpha_pattern": {"up_proj": 10**400}}, r"alpha_pattern\['up_proj'\] is an integer of"),
        ({"lora_dropout": 10**400}, r"lora_dropout is an integer .* a number in \[0, 1\]"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\], expected an object"),
        ({"rank_pattern": {"(?i)Q_PROJ": 2}}, "uses flags, which is not matched"),
        ({"rank_pattern": {"a)|(b": 2}}, "is no regular expression: unbalanced parenthesis"),
        ({"target_modules": "q_proj("}, "is no regular expression"),
        ({"target_modules": r"(q|v)_proj\1"}, "uses GROUPREF, which is not matched"),
        ({"target_modules": "x" * 20_000}, "pattern has 20000 characters"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"target_modules": ["c_attn"]}, "match no module of the base model; its linear modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head': LoRA on the embedding and the hea"),
        (
            {"target_modules": ["embed_tokens"]},
            "'embed_tokens': LoRA on the embedding and the head",
        ),
        ({"target_modules": r".*\.c_attn"}, "match no module"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is '0'"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    model: Transformer, write: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    # json.dumps writes NaN, which the strict reader refuses before the config is looked at
    with pytest.raises(ValueError, match=message):
        AdapterBank(model).load(write(**changes))


def test_missing_files_say_what_to_give(model: Transformer, write: Callable[..., Path]) -> None:
    path = write()
    with pytest.raises(AdapterError, match="no such directory; give the folder PEFT wrote"):
        Adapter.load(path / "nothing", model.slots())
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"found only adapter_model\.bin, which is refused"):
        Adapter.load(path, model.slots())
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        Adapter.load(path, model.slots())


def test_adapter_of_another_base_is_refused(model: Transformer, write: Callable[..., Path]) -> None:
    wider = ModelConfig.from_json(LLAMA | {"hidden_size": 32}, "wider")
    with pytest.raises(AdapterError, match=r"is \[2, 16\], expected \[2, 32\]"):
        AdapterBank(Transformer.random(wider)).load(write())


def test_save_and_load_keep_every_bit(
    model: Transformer, write: Callable[..., Path], tmp_path: Path
) -> None:
    first = Adapter.load(write(rank_pattern={"k_proj": 5}), model.slots(), "a")
    first.save(tmp_path / "again")
    second = Adapter.load(tmp_path / "again", model.slots(), "a")
    assert second.config == first.config
    for module, weights in first.weights.items():
        assert torch.equal(second.weights[module].lora_A, weights.lora_A)
        assert second.weights[module].scaling == weights.scaling


def test_slots_are_reused_and_stay_put(model: Transformer, write: Callable[..., Path]) -> None:
    bank = AdapterBank(model)
    path = write()
    slots = [bank.load(path, name) for name in "abc"]
    assert slots == [0, 1, 2]
    bank.remove("b")
    assert (bank.slot("c"), bank.slot(None)) == (2, -1)
    assert bank.load(path, "d") == 1
    assert bank.names == ("a", "d", "c")
    with pytest.raises(AdapterError, match="'a' is loaded already"):
        bank.load(path, "a")


def test_bank_refuses_what_does_not_fit(model: Transformer, write: Callable[..., Path]) -> None:
    good = Adapter.load(write(), model.slots())
    module = "model.layers.0.self_attn.q_proj"
    odd = LoraWeights(torch.ones(2, 9), torch.ones(16, 2), 1.0)
    with pytest.raises(AdapterError, match="maps 9 to 16 features"):
        AdapterBank(model).add(Adapter("odd", good.config, {module: odd}))


def test_base_rows_of_a_mixed_batch_keep_their_bits(
    model: Transformer, write: Callable[..., Path]
) -> None:
    bank = AdapterBank(model)
    slot = bank.load(write())
    project = bank.mixed(torch.tensor([-1, slot, -1, slot, slot, -1]))
    assert project is not None
    x = torch.randn(6, 16)
    base = model.linear(0, "qkv", x)
    got = project(0, "qkv", x, None)
    assert torch.equal(got[[0, 2, 5]], base[[0, 2, 5]])
    assert not torch.equal(got[1], base[1])
    assert bank.mixed(torch.tensor([-1, -1])) is None
    assert bank.merged(-1) is None


def test_parsed_defaults_follow_peft() -> None:
    config = parse_config({"peft_type": "LORA", "target_modules": ["q_proj"]}, "test")
    assert (config.rank, config.alpha, config.scaling_of("q_proj")) == (8, 8.0, 1.0)
