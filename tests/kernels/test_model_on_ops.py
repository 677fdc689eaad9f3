"""A whole model on the Triton kernels, interpreted, computes what it computes on their references.

With TRITON_INTERPRET=1 the model's layers take the kernels even on a CPU.
"""

import pytest
import torch

from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import Transformer
from fastsafe_kernels import _spec

pytestmark = pytest.mark.skipif(not _spec.INTERPRET, reason="needs TRITON_INTERPRET=1")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_json(SIZES | FAMILIES[family], family)
    model = Transformer.random(config)
    lengths = [5, 1, 12]
    token_ids = torch.arange(sum(lengths)) * 7 % 61
    positions = torch.cat([torch.arange(n) for n in lengths])
    upstream = torch.randn(sum(lengths), 48)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.ones(48, requires_grad=True)
        embedding = model.embedding
        model.embedding = embedding * scale
        hidden = model.forward(token_ids, positions, PackedAttention(lengths))
        model.embedding = embedding
        return hidden.detach(), torch.autograd.grad(hidden, scale, upstream)[0]

    on_kernels = run()
    monkeypatch.setattr(_spec, "INTERPRET", False)
    on_references = run()
    for kernel, reference in zip(on_kernels, on_references, strict=True):
        assert not torch.equal(kernel, reference), "the same code ran twice"
        torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-4)
