"""Versions in the header, one hypothesis profile, and what the ``gpu`` marker means."""

import importlib.util
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "triton", "numpy", "tokenizers", "safetensors", "transformers", "peft")

# a two-layer Llama of words, for the engine and for training
TINY = {
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

# commands take a GPU where there is one; tests that need one say so
os.environ.setdefault("FASTSAFE_DEVICE", "cpu")

if importlib.util.find_spec("hypothesis"):  # a bare GPU image need not have it
    from hypothesis import settings

    # Derandomized: a red run is red again. No deadline: a slow machine is not a bug.
    settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _lines(folder: str) -> str:
    files = (p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".hpp"})
    return f"{folder} {sum(len(p.read_bytes().splitlines()) for p in files)}"


def pytest_report_header() -> list[str]:
    """Print what the result depends on, and how large the thing is."""
    mode = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "not interpreted"
    return [
        f"python {platform.python_version()}, kernels {mode}, " + ", ".join(map(_version, SHOWN)),
        "lines: " + ", ".join(map(_lines, ("fastsafe", "kernels", "csrc", "tests"))),
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none, saying so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama whose logits are far from flat."""
    import tokenizers

    from fastsafe.io import safetensors
    from fastsafe.model import ModelConfig, Transformer

    path = tmp_path_factory.mktemp("tiny")
    model = Transformer.random(ModelConfig.from_json(TINY, "tiny"), seed=3)
    tensors = {name: t.contiguous() for name, t in model.tensors().items()}
    tensors["lm_head.weight"] = 40 * tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] = 20 * tensors["model.embed_tokens.weight"]
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(TINY))
    words = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    return path


@pytest.fixture
def llm(checkpoint: Path) -> Any:
    """The checkpoint, loaded fresh."""
    from fastsafe import LLM

    return LLM(checkpoint)
