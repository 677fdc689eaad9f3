"""The tiny checkpoint in both backends, adapters for it, and an architecture only one knows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def theirs(checkpoint: Path) -> Any:
    """The tiny Llama in transformers. Tests leave no adapter behind."""
    from fastsafe.transformers_backend import TransformersLLM

    return TransformersLLM(checkpoint, batch_size=3)


@pytest.fixture(scope="session")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of PEFT that change the answers, one with a dot in its name."""
    found = {}
    for i, name in enumerate(["one", "two.0"]):
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        config = peft.LoraConfig(r=4 + i, lora_alpha=8, target_modules="all-linear")
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(i)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        found[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with a tokenizer of its old kind: vocab.json and merges.txt."""
    path = tmp_path_factory.mktemp("gpt2") / "gpt2"
    path.mkdir()
    words = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "<|endoftext|>", "th", "the", "Ġa"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ a\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=27,
        eos_token_id=27,
    )
    model = transformers.GPT2LMHeadModel(config)
    for weight in model.parameters():
        weight.data.mul_(4)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path)
    return path
