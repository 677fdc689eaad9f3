"""The losses of training on the fused ops, as a GPU takes them, equal those of chunked logits."""

import pytest
import torch

from fastsafe.model import ModelConfig, Transformer, cpu_ops
from fastsafe.train import loss
from fastsafe_kernels import _spec

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.mark.skipif(not _spec.INTERPRET, reason="needs TRITON_INTERPRET")
def test_fused_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer.random(ModelConfig.from_json(SIZES, "tiny"), seed=1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator)
    base = hidden + 0.3 * torch.randn(9, 32, generator=generator)
    targets, weights = torch.arange(9) * 5 % 67, torch.linspace(0, 2, 9)

    def run() -> tuple[torch.Tensor, ...]:
        leaf = hidden.clone().requires_grad_()
        terms = (
            loss.token_loss(leaf, targets, model, weights),
            loss.divergence(leaf, base, model, model),
        )
        (terms[0].sum() + 2 * terms[1].sum()).backward()
        assert leaf.grad is not None
        return (
            *(t.sum().detach() for t in terms),
            leaf.grad,
            loss.target_logprobs(hidden, targets, model),
        )

    fused = run()
    for module in (_spec, cpu_ops, loss):
        monkeypatch.setattr(module, "INTERPRET", False)
    plain = run()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert plain[1] > 0.001
