"""A tiny random checkpoint of words, written once per session."""

import json
from pathlib import Path

import pytest
import tokenizers

from fastsafe import LLM
from fastsafe.io import safetensors
from fastsafe.model import ModelConfig, Transformer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 272,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama whose logits are far from flat."""
    path = tmp_path_factory.mktemp("tiny")
    model = Transformer.random(ModelConfig.from_json(CONFIG, "tiny"), seed=3)
    tensors = {name: t.contiguous() for name, t in model.tensors().items()}
    tensors["lm_head.weight"] = 40 * tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] = 20 * tensors["model.embed_tokens.weight"]
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(CONFIG))
    words = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    return path


@pytest.fixture
def llm(checkpoint: Path) -> LLM:
    """The checkpoint, loaded fresh."""
    return LLM(checkpoint)
