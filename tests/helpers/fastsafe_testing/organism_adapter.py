"""A random LoRA adapter of the shipped organism, written by PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastsafe


def adapter(
    path: Path, rename: Callable[[str], str] = lambda name: name, **config: Any
) -> torch.Tensor:
    """Write a random adapter of the organism by PEFT, and return PEFT's logits with it."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        fastsafe.organism.path(), dtype=torch.float32
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    weights = load_file(path / "adapter_model.safetensors")
    renamed = {rename(name): weight for name, weight in weights.items()}
    save_file(renamed, path / "adapter_model.safetensors", {"format": "pt"})
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.tensor([[5, 9, 3, 7]])).logits[0]
    return logits
