"""Adapter directories as tools write them: what PEFT loads gives PEFT's logits here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsafe
from fastsafe.errors import AdapterError
from fastsafe.io import safetensors
from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import AdapterBank
from fastsafe.transformers_backend.transformers_llm import TransformersLLM

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = [5, 9, 3, 7, 11, 2, 8]
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
# A real expression of Unsloth for text and image models, shortened.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|q_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "targets that this base lacks": {"target_modules": ["q_proj", "v_proj", "c_attn", "fc1"]},
    "no targets: PEFT's default": {"target_modules": None},
    "targets by whole names": {
        "target_modules": [f"model.layers.{i}.self_attn.{q}_proj" for i in range(3) for q in "qv"],
        "layers_to_transform": [99],  # PEFT asks it of last names alone
    },
    "an expression with lazy repeats": {"target_modules": UNSLOTH},
    "an expression that looks ahead": {
        "target_modules": r"^(model)(?!.*(lm_head|_o)).*\.[qv]_proj"
    },
    "layers []": {"layers_to_transform": [], "layers_pattern": []},
    "layers_pattern ''": {"layers_pattern": ""},
    "layers by two patterns": {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]},
    "layers by a path": {"layers_to_transform": [0, 1, 2], "layers_pattern": "model.layers"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "a pattern for each of 336 modules": {
        "rank_pattern": {f"layers.{i}.{j}": 9 for i in range(100, 148) for j in range(7)}
    },
    "the first of two patterns counts": {
        "alpha_pattern": {r"layers\.1\..*": 3, "q_proj": 20, "self_attn.v_proj": 1}
    },
    "a pattern of half a name": {"alpha_pattern": {"proj": 3, "attn.q_proj": 5, "": 7}},
    "biases that are not there": {"bias": "all"},
    "parameters that are not there": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "nothing saved beside it": {"modules_to_save": [], "trainable_token_indices": None},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no initialisation": {"init_lora_weights": False},
    "CorDA's settings without CorDA": {"corda_config": {"corda_method": "ipm"}},
    "excluded names that are not there": {"exclude_modules": ["visual", "k_proj"]},
    "excluded by an expression": {"exclude_modules": r".*\.(k|gate)_proj"},
    "keys of the future": {"use_more": False, "more_config": None, "more": {}, "depth": 0},
    "keys of the past": {"merge_weights": False, "enable_lora": None, "revision": "main"},
}
WEIGHTS: dict[str, Callable[[str], str]] = {
    "the adapter's name in the keys": lambda k: k.replace(".weight", ".default.weight"),
}
# PeftModel reads none of these and computes the base; transformers' load_adapter reads them.
KEYS_OF_TRANSFORMERS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda k: k.removeprefix(PREFIX),
    "half a prefix": lambda k: k.replace("base_model.model.model.", PREFIX),
    "bare layers": lambda k: k.removeprefix(PREFIX + "model."),
}


@pytest.fixture
def pair(build: Callable[..., Any]) -> Any:
    pair = build("llama2", vocab_size=438)  # as many tokens as the tokenizer has that ships
    shutil.copy(fastsafe.organism.path() / "tokenizer.json", pair.path)
    return pair


@pytest.fixture
def write(pair: Any, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter on q_proj and v_proj: ``write(tensors=changed, **config)``."""

    def make(tensors: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(pair.path)
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(base, lora)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
        path = tmp_path / "adapter"
        model.save_pretrained(path)
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        weights = path / "adapter_model.safetensors"
        safetensors.write(weights, tensors(safetensors.read(weights)))
        return path

    return make


@torch.no_grad()
def ours(pair: Any, path: Path) -> Tensor:
    bank = AdapterBank(pair.model)
    project = bank.merged(bank.load(path))
    positions = torch.arange(len(IDS))
    hidden = pair.model.forward(torch.tensor(IDS), positions, PackedAttention([len(IDS)]), project)
    logits: Tensor = pair.model.logits(hidden)
    return logits


@torch.no_grad()
def theirs(pair: Any, path: Path) -> Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.path)
    logits: Tensor = peft.PeftModel.from_pretrained(base, path).eval()(torch.tensor([IDS])).logits
    return logits[0]


def check_equal(pair: Any, path: Path, want: Tensor) -> None:
    with torch.no_grad():
        base = pair.reference(torch.tensor([IDS])).logits[0]
    assert (want - base).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(ours(pair, path), want, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_peft_loads(pair: Any, write: Callable[..., Path], name: str) -> None:
    path = write(**CONFIGS[name])
    check_equal(pair, path, theirs(pair, path))


@pytest.mark.parametrize("name", WEIGHTS)
def test_keys_that_peft_loads(pair: Any, write: Callable[..., Path], name: str) -> None:
    path = write(lambda tensors: {WEIGHTS[name](k): t for k, t in tensors.items()})
    check_equal(pair, path, theirs(pair, path))


@pytest.mark.parametrize("name", KEYS_OF_TRANSFORMERS)
def test_keys_that_transformers_loads(pair: Any, write: Callable[..., Path], name: str) -> None:
    path = write(lambda tensors: {KEYS_OF_TRANSFORMERS[name](k): t for k, t in tensors.items()})
    base = transformers.AutoModelForCausalLM.from_pretrained(pair.path)
    base.load_adapter(path)
    with torch.no_grad():
        check_equal(pair, path, base.eval()(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_float_dtype(
    pair: Any, write: Callable[..., Path], dtype: torch.dtype
) -> None:
    path = write(lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})
    check_equal(pair, path, theirs(pair, path))


def test_a_table_that_equals_the_bases_is_left_out(pair: Any, write: Callable[..., Path]) -> None:
    tables = {f"{PREFIX}model.embed_tokens.weight": pair.model.embedding}
    tables[f"{PREFIX}lm_head.weight"] = pair.model.head
    path = write(lambda tensors: tensors | tables, modules_to_save=["lm_head", "embed_tokens"])
    check_equal(pair, path, theirs(pair, path))


@pytest.mark.parametrize("backend", ["engine", "transformers"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda embedding: embedding + 0.1, "differs from the base model's, .* merge the adapter"),
        (lambda embedding: torch.cat((embedding, embedding[:2])), "a vocabulary of its own; merge"),
    ],
)
def test_a_table_of_its_own_is_refused(
    pair: Any, write: Callable[..., Path], change: Any, message: str, backend: str
) -> None:
    table = change(pair.model.embedding)
    path = write(lambda tensors: tensors | {f"{PREFIX}model.embed_tokens.weight": table})
    load = AdapterBank(pair.model).load
    if backend == "transformers":
        load = TransformersLLM(pair.path).load_adapter
    with pytest.raises(AdapterError, match=rf"model\.embed_tokens\.weight .*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*, expected null or modules whose"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.*is missing; the adapter is"),
        ({"target_modules": ["q_proj"]}, "6 unexpected tensors .*v_proj"),
        ({"rank_pattern": {"q_proj": 2}}, r"is \[4, 64\], expected \[2, 64\]"),
        ({"r": 8}, r"is \[4, 64\], expected \[8, 64\]"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    pair: Any, write: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        ours(pair, write(**config))


def test_keys_of_another_model_are_shown(pair: Any, write: Callable[..., Path]) -> None:
    path = write(
        lambda tensors: {k.replace("model.layers", "t.layers"): t for k, t in tensors.items()}
    )
    with pytest.raises(
        AdapterError, match=r"of another base model; its names begin like 't\.layers"
    ):
        ours(pair, path)


def test_peft_never_sees_a_pattern_of_the_file(pair: Any, write: Callable[..., Path]) -> None:
    path = write(
        target_modules=r"(.|[a-z._0-9])*[qv]_proj", alpha_pattern={"(.|[a-z._0-9])*v_proj": 2}
    )
    want = ours(pair, path)
    llm = TransformersLLM(pair.path)
    llm.load_adapter(path, "a")
    config = llm._peft.peft_config["adapter0"]
    assert "model.layers.0.self_attn.q_proj" in config.target_modules
    assert r"model\.layers\.0\.self_attn\.v_proj" in config.alpha_pattern
    torch.testing.assert_close(llm.logits(IDS, "a"), want, atol=1e-4, rtol=1e-4)
