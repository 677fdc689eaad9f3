"""A base in NF4 equals one whose weights were replaced by what the codes mean."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import Transformer, nf4
from fastsafe.model.attention import PackedAttention
from fastsafe_kernels.nf4_dequantize import CODES

LENGTHS = [9, 4]


def forward(
    model: Transformer, *, trained: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States, and the gradient that reaches the first layer's input."""
    ids = torch.arange(sum(LENGTHS)) * 7 % 96
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    leaf = model.embedding.detach().clone().requires_grad_(trained)
    kept, model.embedding = model.embedding, leaf
    hidden = model.forward(ids, positions, PackedAttention(LENGTHS))
    model.embedding = kept
    if trained:
        hidden.square().sum().backward()
    return hidden.detach(), leaf.grad


def replaced(checkpoint: Path, quantized: nf4.NF4Transformer) -> Transformer:
    """The same model over whole weights, each the dequantized one."""
    plain = Transformer.load(Checkpoint(checkpoint))
    for (layer, name), weight in quantized.quantized.items():
        setattr(plain.layers[layer], name, weight.dequantize())
    return plain


def test_it_equals_the_model_of_dequantized_weights(checkpoint: Path) -> None:
    model = nf4.load(Checkpoint(checkpoint))
    plain = replaced(checkpoint, model)
    for trained in (False, True):
        got, gradient = forward(model, trained=trained)
        expected, expected_gradient = forward(plain, trained=trained)
        assert torch.equal(got, expected)
        if trained:
            assert gradient is not None
            assert expected_gradient is not None
            assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    original = forward(Transformer.load(Checkpoint(checkpoint)))[0]
    error = (got - original).norm() / original.norm()
    assert 0.01 < error < 0.5, "4 bits change the result, but do not spoil it"


def test_tensors_have_the_names_and_values_of_the_file(checkpoint: Path) -> None:
    model = nf4.load(Checkpoint(checkpoint))
    plain = replaced(checkpoint, model)
    tensors = model.tensors()
    assert tensors.keys() == plain.tensors().keys()
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensors[name], tensor), name


def test_codes_are_those_of_each_tensor_of_the_file(checkpoint: Path) -> None:
    """A fused weight is cut as its parts are, so that codes equal bitsandbytes' for each."""
    model = nf4.load(Checkpoint(checkpoint))
    held = Checkpoint(checkpoint).read()
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    parts = [nf4.NF4Weight.of(held[name]) for name in names]
    fused = model.quantized[1, "qkv"]
    assert torch.equal(fused.codes, torch.cat([part.codes for part in parts]))
    # the definition, value by value, in blocks of 64 over the rows
    weight = held[names[0]].flatten()[:64]
    absmax = weight.abs().max()
    table = torch.tensor(CODES)
    nearest = (weight[:, None] / absmax - table).abs().argmin(1)
    assert torch.equal(fused.codes[0] >> 4, nearest[0::2].byte())
    assert torch.equal(fused.codes[0] & 15, nearest[1::2].byte())
    assert torch.allclose(fused.dequantize().flatten()[:64], table[nearest] * absmax)


def test_memory_is_a_few_bits_per_weight(checkpoint: Path) -> None:
    model = nf4.load(Checkpoint(checkpoint))
    elements = sum(w.shape[0] * w.shape[1] for w in model.quantized.values())
    held = sum(w.codes.nbytes + w.absmax.nbytes for w in model.quantized.values())
    assert held * 8 / elements == pytest.approx(4.5, rel=0.01)
    rest = sum(t.numel() * t.element_size() for t in Transformer.parameters(model))
    assert sum(t.numel() * t.element_size() for t in model.parameters()) == rest + held
    assert all(t.numel() == 0 for layer in model.layers for t in (layer.qkv, layer.o, layer.down))


@pytest.mark.parametrize("mode", ["merged", "mixed"])
def test_the_engine_answers_and_trains_on_it(
    checkpoint: Path, tmp_path: Path, mode: Literal["merged", "mixed"]
) -> None:
    """The same bits as a checkpoint on disk that holds the dequantized weights."""
    from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune

    llm = LLM(checkpoint, adapters=mode, quantize="nf4")
    whole = tmp_path / "whole"
    shutil.copytree(checkpoint, whole)
    tensors = {name: t.contiguous() for name, t in llm.model.tensors().items()}
    safetensors.write(whole / "model.safetensors", tensors)
    plain = LLM(whole, adapters=mode)
    assert (llm.describe()["quantize"], plain.describe()["quantize"]) == ("nf4", None)
    rows = [{"prompt": [1, 2, 3 + i], "completion": [4, 5 + i]} for i in range(6)]
    job = FinetuneJob("a", rows, TrainConfig(max_steps=4, batch_size=3, learning_rate=1e-2))
    results = [finetune(each, [job], tmp_path / str(i))[0] for i, each in enumerate((llm, plain))]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)
    assert results[0].losses[-1] < results[0].losses[0]
    prompts = [[5 + i, 7, 9] for i in range(24)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
    names = ["a", None] * 12
    for each in (llm, plain):
        each.load_adapter(results[0].adapter_dir, "a")
    answers = llm.generate(prompts, params, names)
    assert answers == plain.generate(prompts, params, names)
    assert answers != LLM(checkpoint).generate(prompts, params)
    assert answers[4:5] == llm.generate(prompts[4:5], params, names[4:5])
    assert llm.score(prompts, prompts, names) == plain.score(prompts, prompts, names)
    assert torch.equal(llm.logits([1, 2, 3], "a"), plain.logits([1, 2, 3], "a"))


def test_weights_that_do_not_divide_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"hidden_size": 20, "intermediate_size": 5, "head_dim": 4}
    from fastsafe.model import ModelConfig

    small = Transformer.random(ModelConfig.from_json(config, "small"))
    tensors = {name: t.contiguous() for name, t in small.tensors().items()}
    safetensors.write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"k_proj.weight has 160 elements, expected a mult"):
        nf4.load(Checkpoint(tmp_path))


def test_a_tied_head_that_differs_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from model.embed_tokens.weight"):
        nf4.load(Checkpoint(tmp_path))


def test_training_keeps_no_dequantized_weight(checkpoint: Path) -> None:
    from fastsafe.model.peft import LoraConfig
    from fastsafe.train.trained_lora import TrainedLora

    model = nf4.load(Checkpoint(checkpoint))
    lora = TrainedLora(model, LoraConfig(rank=2, alpha=2, target_modules="all-linear"), 0)
    project = lora.projection(0.0, 0)
    ids, positions = torch.arange(9), torch.arange(9)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.forward(ids, positions, PackedAttention([9]), project).sum().backward()
    shapes = {tuple(w.shape) for w in model.quantized.values()}
    assert kept
    assert not shapes & {tuple(shape) for shape in kept}
    assert project.gradient.count_nonzero()
