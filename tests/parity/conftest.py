"""Tiny random checkpoints of every family, written by transformers and loaded by both sides."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model.transformer import Transformer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 1.5 * i for i in range(6)],
    "original_max_position_embeddings": 48,
}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            # small caps, so that they bend the scores of a random model
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "layer_types": WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "phi3-longrope": (
        "Phi3",
        {
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 48,
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
}


@dataclass
class Pair:
    """One checkpoint, loaded by both."""

    path: Path
    reference: Any  # transformers' model, fp32, in eval mode
    model: Transformer


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Pair]:
    """Write a tiny checkpoint of a family and load it: ``build(family, seed=0, **config)``."""

    def make(family: str, *, seed: int = 0, shard: str = "1GB", **changes: Any) -> Pair:
        prefix, traits = FAMILIES[family]
        config = getattr(transformers, f"{prefix}Config")(**(SIZES | traits | changes))
        name = "Gemma3ForCausalLM" if prefix == "Gemma3Text" else f"{prefix}ForCausalLM"
        reference = getattr(transformers, name)(config).eval()
        randomize(reference, seed)
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        transformers.utils.logging.disable_progress_bar()
        reference.save_pretrained(path, max_shard_size=shard)
        return Pair(path, reference, Transformer.load(Checkpoint(path)))

    return make


@torch.no_grad()
def randomize(reference: Any, seed: int) -> None:
    """Give every weight a size that matters, so that a swapped or missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reference.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:  # around its initial value: 1, or 0 for Gemma
            weight.add_(0.3 * noise)
        elif weight.ndim == 1 or "embed" in name or "lm_head" in name:
            weight.copy_(0.5 * noise)
        else:
            weight.copy_(1.5 * noise * weight.shape[1] ** -0.5)
