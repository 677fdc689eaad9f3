"""A whole model on the Triton kernels, interpreted, computes what it computes on their references.

With TRITON_INTERPRET=1 the model's layers take the kernels even on a CPU.
"""

import pytest
import torch

from fastsafe.engine.paged_cache import DEVICE_PAGE, OpsAttention, PageStore
from fastsafe.model import cpu_ops
from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.lora import Adapter, AdapterBank, LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import Transformer
from fastsafe.train.loss import token_loss
from fastsafe.train.optim import AdamW
from fastsafe.train.trained_lora import TrainedLora
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
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "olmo2"])
def test_steps_over_pages_are_one_forward_pass(family: str) -> None:
    """Prompts cut in two, rows of one and two pages, windows and norms of heads included."""
    config = ModelConfig.from_json(SIZES | {"max_position_embeddings": 80} | FAMILIES[family], "x")
    model = Transformer.random(config)
    lengths, cuts = [8, 5, 66], [(3, 4), (1, 4), (62, 65)]
    rows = [torch.arange(n) * 7 % 61 for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    store = PageStore(config, 6, model.device, model.dtype)
    for page in (*store.keys, *store.values):
        page.fill_(torch.nan)  # nothing is read that was not written
    table = torch.tensor([[4, 5], [1, 5], [2, 0]], dtype=torch.int32)
    with torch.inference_mode():
        whole = model.forward(torch.cat(rows), positions, PackedAttention(lengths)).split(lengths)
        done = [0, 0, 0]
        for ends in (*zip(*cuts, strict=True), lengths):
            spans = [torch.arange(a, b) for a, b in zip(done, ends, strict=True)]
            owner = torch.tensor([i for i, span in enumerate(spans) for _ in span])
            at = torch.cat(spans)
            ids = torch.cat([row[span] for row, span in zip(rows, spans, strict=True)])
            places = table[owner, at // DEVICE_PAGE].long() * DEVICE_PAGE + at % DEVICE_PAGE
            attend = OpsAttention(store, table[owner], places, at + 1)
            got = model.forward(ids, at, attend, context_lens=at + 1)
            want = torch.cat([w[span] for w, span in zip(whole, spans, strict=True)])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            done = list(ends)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_gradients(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every adapter's gradient, through all layers, on kernels and on references."""
    model = Transformer.random(ModelConfig.from_json(SIZES | FAMILIES["llama"], "llama"))
    targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    lora = TrainedLora(model, LoraConfig(rank=3, alpha=5.0, target_modules=targets), seed=1)
    lora.flat.add_(torch.randn(lora.flat.shape) * 0.05)
    lora.refresh()
    lengths = [5, 1, 12]
    token_ids = torch.arange(sum(lengths)) * 7 % 61
    positions = torch.cat([torch.arange(n) for n in lengths])

    def run() -> tuple[float, torch.Tensor]:
        project = lora.projection(dropout, seed=3)
        hidden = model.forward(token_ids, positions, PackedAttention(lengths), project)
        loss = token_loss(hidden, token_ids.flip(0), model)
        loss.backward()
        return loss.item(), project.gradient

    loss, gradient = run()
    optimizer = AdamW(lora.flat.clone(), 0.01, 1.0)
    optimizer.step(gradient, 1e-2)
    monkeypatch.setattr(_spec, "INTERPRET", False)
    plain_loss, plain = run()
    reference = AdamW(lora.flat.clone(), 0.01, 1.0)
    reference.step(gradient, 1e-2)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert not torch.equal(gradient, plain), "the same code ran twice"
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(optimizer.parameters, reference.parameters, rtol=1e-5, atol=1e-6)
    assert plain.abs().max() > 0.01
    # the C++ operations agree, too
    monkeypatch.setattr(cpu_ops, "INTERPRET", False)
    native_loss, native = run()
    assert native_loss == pytest.approx(plain_loss, rel=1e-5)
    torch.testing.assert_close(native, plain, rtol=1e-3, atol=1e-4)
