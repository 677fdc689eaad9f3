"""A whole model on the Triton kernels, interpreted, computes what it computes on their references.

With TRITON_INTERPRET=1 the model's layers take the kernels even on a CPU.
"""

import pytest
import torch

from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, AdapterBank, LoraWeights
from fastsafe.model.peft import LoraConfig
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


@pytest.mark.parametrize("ids", [[-1] * 5 + [2] + [0] * 12, [0, 2, -1] * 6])
def test_a_mixed_batch_is_each_adapter_alone(ids: list[int]) -> None:
    """Adapters of different ranks and targets; rows sorted by adapter or not, one slot free."""
    model = Transformer.random(ModelConfig.from_json(SIZES | FAMILIES["llama"], "llama"))
    bank = AdapterBank(model)
    modules = {
        "a": (3, ["q_proj", "v_proj", "down_proj"]),
        "b": (2, ["q_proj"]),
        "c": (5, ["k_proj", "gate_proj", "up_proj", "o_proj"]),
    }
    for name, (rank, targets) in modules.items():
        config = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=tuple(targets))
        weights = {
            module: LoraWeights(
                torch.randn(rank, slot.in_features) * 0.1,
                torch.randn(slot.end - slot.begin, rank) * 0.1,
                2.0,
            )
            for module, slot in model.slots().items()
            if module.rpartition(".")[2] in targets
        }
        bank.add(Adapter(name, config, weights))
    bank.remove("b")
    token_ids, positions = torch.arange(18) * 7 % 61, torch.zeros(18, dtype=torch.long)
    attend = PackedAttention([1] * 18)
    keep = torch.tensor([0, 5, 17])
    with torch.inference_mode():
        mixed = bank.mixed(torch.tensor(ids))
        got = model.forward(token_ids, positions, attend, mixed)
        kept = model.forward(token_ids, positions, attend, mixed, keep)
        for slot in (-1, 0, 2):
            alone = model.forward(token_ids, positions, attend, bank.merged(slot))
            rows = [i for i, own in enumerate(ids) if own == slot]
            torch.testing.assert_close(got[rows], alone[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, got[keep], rtol=1e-4, atol=1e-4)
    assert (got[ids.index(0)] - alone[ids.index(0)]).abs().max() > 0.01, "adapters must matter"
