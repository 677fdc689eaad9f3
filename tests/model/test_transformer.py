from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.layers import rms_norm
from fastsafe.model.transformer import Transformer

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (9, 14, 17)
IDS = torch.arange(sum(LENGTHS)) * 11 % 50
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def model_of(**changes: Any) -> Transformer:
    return Transformer.random(ModelConfig.from_json(RAW | changes, "config.json"), seed=1)


class Spy:
    """Projects with the base weights and notes what it was asked for."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.calls: list[tuple[int, str, int, Tensor | None]] = []

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        self.calls.append((layer, name, len(x), rows))
        return self.model.linear(layer, name, x)


@torch.no_grad()
def test_keep_gives_the_rows_of_the_whole_result() -> None:
    model = model_of()
    keep = torch.tensor([8, 22, 39, 3, 3, 17, 20, 30])
    whole = model.forward(IDS, POSITIONS, PackedAttention(LENGTHS))
    kept = model.forward(IDS, POSITIONS, PackedAttention(LENGTHS), keep=keep)
    assert whole.shape == (40, 32)
    assert torch.equal(kept, whole[keep])


@torch.no_grad()
def test_project_sees_every_linear_with_its_rows() -> None:
    model = model_of()
    spy, keep = Spy(model), torch.tensor([8, 22, 39])
    hidden = model.forward(IDS, POSITIONS, PackedAttention(LENGTHS), spy, keep)
    assert torch.equal(hidden, model.forward(IDS, POSITIONS, PackedAttention(LENGTHS), keep=keep))
    names = ["qkv", "o", "gate_up", "down"]
    assert [(layer, name) for layer, name, _, _ in spy.calls] == [
        (layer, name) for layer in range(3) for name in names
    ]
    assert all(m == 40 and rows is None for _, _, m, rows in spy.calls[:9])
    assert all(m == 3 and rows is keep for _, _, m, rows in spy.calls[9:])


def test_linear_takes_another_weight_and_keeps_the_bias() -> None:
    model = model_of(attention_bias=True)
    layer = model.layers[1]
    assert layer.qkv_bias is not None
    layer.qkv_bias.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, 32)
    want = x @ (2 * layer.qkv).T + layer.qkv_bias
    torch.testing.assert_close(model.linear(1, "qkv", x, 2 * layer.qkv), want)
    assert model.weight(1, "qkv") is layer.qkv


def test_random_is_a_function_of_the_seed() -> None:
    config = ModelConfig.from_json(RAW, "config.json")
    a, b, c = (Transformer.random(config, seed=s) for s in (1, 1, 2))
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert not torch.equal(a.embedding, c.embedding)
    logits = a.logits(a.forward(IDS, POSITIONS, PackedAttention(LENGTHS)))
    assert logits.isfinite().all()
    half = Transformer.random(config, seed=1, dtype=torch.bfloat16)
    assert torch.equal(half.layers[2].down, a.layers[2].down.bfloat16())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_distinct_and_complete(tied: bool) -> None:
    model = model_of(tie_word_embeddings=tied, attention_bias=True)
    parameters = model.parameters()
    assert len({t.data_ptr() for t in parameters}) == len(parameters)
    assert not any(t.requires_grad for t in parameters)
    listed = sum(t.numel() for t in model.tensors().values())
    assert sum(t.numel() for t in parameters) == listed


def test_tensors_are_views() -> None:
    model = model_of()
    model.tensors()["model.layers.0.self_attn.k_proj.weight"].zero_()
    assert not model.layers[0].qkv[32:48].any()
    assert model.layers[0].qkv[:32].all()


def test_frozen_weights_build_no_graph() -> None:
    model = model_of()
    assert not model.forward(IDS, POSITIONS, PackedAttention(LENGTHS)).requires_grad


@torch.no_grad()
def test_embedding_scale_is_rounded_to_the_dtype_as_gemma_does() -> None:
    raw = RAW | {
        "architectures": ["GemmaForCausalLM"],
        "hidden_size": 24,  # its root is not a bf16 number
        "head_dim": 8,
        "rms_norm_eps": 1.0,  # so large that the first norm lets the scale through
    }
    config = ModelConfig.from_json(raw, "config.json")
    model = Transformer.random(config, dtype=torch.bfloat16)
    seen: list[Tensor] = []

    def project(layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        seen.append(x)
        return model.linear(layer, name, x)

    model.forward(IDS, POSITIONS, PackedAttention(LENGTHS), project)
    scale = torch.tensor(24.0).sqrt().bfloat16()
    assert scale.float() != torch.tensor(24.0).sqrt()
    want = rms_norm(model.embedding[IDS] * scale, torch.zeros(24).bfloat16(), 1.0, one_plus=True)
    assert torch.equal(seen[0], want)


def test_logits_are_fp32_scaled_and_capped() -> None:
    granite = {"architectures": ["GraniteForCausalLM"], "logits_scaling": 4.0}
    model = model_of(**granite)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head.T / 4)
    gemma = {"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 0.01}
    capped = model_of(**gemma).logits(hidden)
    assert capped.abs().max() <= 0.01
    config = ModelConfig.from_json(RAW, "config.json")
    half = Transformer.random(config, dtype=torch.bfloat16)
    assert half.logits(hidden.bfloat16()).dtype == torch.float32
