"""Fields of config.json, one changed at a time: transformers' logits or a refusal, never others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastsafe.errors import CheckpointError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model.attention import PackedAttention
from fastsafe.model.transformer import Transformer

IDS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(0))
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FULL, WINDOWED = "full_attention", "sliding_attention"
VALUES: dict[str, list[Any]] = {
    "architectures": [[]],
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "attention_multiplier": [0.3],
    "attn_logit_softcapping": [1.0, None],
    "dtype": ["torch.bfloat16", "auto", 7],
    "embedding_multiplier": [3.0],
    "final_logit_softcapping": [1.0, None],
    "head_dim": [16, 24],
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "swish"],
    "hidden_activation": ["gelu", "silu", None],
    "is_causal": [False],
    "is_decoder": [True],
    "layer_types": [[FULL] * 3, [WINDOWED] * 3, [WINDOWED, FULL, FULL], None],
    "logits_scaling": [3.0],
    "max_position_embeddings": [32],
    "max_window_layers": [0, 2],
    "mlp_bias": [True],
    "num_key_value_heads": [1, 4, None],
    "num_nextn_predict_layers": [1],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5],
    "pretraining_tp": [2],
    "qk_norm": [True],
    "query_pre_attn_scalar": [64],
    "residual_multiplier": [0.5],
    "rms_norm_eps": [1e-2],
    "rope_local_base_freq": [100.0],
    "rope_parameters": [None, {}, {"rope_theta": 100.0}, LINEAR, {FULL: LINEAR}],
    "rope_scaling": [None, LINEAR, YARN, {"type": "linear", "factor": 4.0}],
    "rope_theta": [500.0],
    "sliding_window": [5, None],
    "sliding_window_pattern": [1, 2],
    "tie_word_embeddings": [True, False],
    "use_bidirectional_attention": [True],
    "use_cache": [False],
    "use_sliding_window": [True, False],
}
FAMILIES = ["llama2", "mistral", "qwen2-window", "gemma3", "phi3-longrope"]


@torch.no_grad()
def theirs(path: Path, weights: dict[str, Tensor]) -> Tensor | None:
    """Return the logits; None where transformers refuses the config or lacks a tensor."""
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(weights)
        logits: Tensor = model.eval()(IDS[None]).logits[0]
    except Exception:  # its own errors of validation, and torch's of shapes
        return None
    return logits


@torch.no_grad()
def ours(path: Path) -> Tensor | None:
    try:
        model = Transformer.load(Checkpoint(path))
    except CheckpointError:
        return None
    attend = PackedAttention([len(IDS)])
    return model.logits(model.forward(IDS, torch.arange(len(IDS)), attend))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_changes_the_logits_silently(family: str, build: Callable[..., Any]) -> None:
    pair = build(family)
    path, weights = pair.path, pair.reference.state_dict()
    raw = json.loads((path / "config.json").read_text())
    changes = [{field: value} for field, values in VALUES.items() for value in values]
    # the spelling of transformers 4 has no rope_parameters
    changes += [
        change | {"rope_parameters": None} for change in changes if next(iter(change))[:4] == "rope"
    ]
    compared, differing = 0, []
    for change in changes:
        (path / "config.json").write_text(json.dumps(raw | change))
        got = ours(path)
        want = None if got is None else theirs(path, weights)
        if got is not None and want is not None:
            compared += 1
            if not (got - want).norm() < 1e-4 * want.norm():
                differing.append(change)
    assert compared > 25
    assert not differing
