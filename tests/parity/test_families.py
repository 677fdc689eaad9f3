"""Our decoder equals transformers on a tiny random checkpoint of every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model.attention import PackedAttention
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.transformer import Transformer
from fastsafe.model.weights import Layer, Weights, placements, view

FAMILIES = [
    "llama2", "llama3", "llama-biases", "mistral", "qwen2", "qwen2-window", "qwen3",
    "gemma", "gemma2", "gemma3", "phi3", "phi3-longrope", "granite", "olmo2",
]  # fmt: skip
BOUND = 1e-4  # relative error of fp32 logits that the product promises
Build = Callable[..., Any]


def ids_of(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(128, (n,), generator=generator) for n in lengths]


def packed_logits(model: Transformer, sequences: list[Tensor], **options: Any) -> list[Tensor]:
    lengths = [len(s) for s in sequences]
    positions = torch.cat([torch.arange(n) for n in lengths])
    attend = PackedAttention(lengths)
    hidden = model.forward(torch.cat(sequences), positions, attend, **options)
    return list(model.logits(hidden).split(lengths))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


class Cache:
    """A plain Attend with a cache: one sequence, softmax written out."""

    def __init__(self, layers: int) -> None:
        self.keys = [torch.empty(0)] * layers
        self.values = [torch.empty(0)] * layers

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        scale, window, softcap = flags
        if len(self.keys[layer]):
            k = torch.cat((self.keys[layer], k))
            v = torch.cat((self.values[layer], v))
        self.keys[layer], self.values[layer] = k, v
        groups = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
        hidden = ahead > 0
        if window is not None:
            hidden |= ahead <= -window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, 1))


@torch.no_grad()
def greedy(model: Transformer, prompt: Tensor, count: int) -> list[int]:
    """Generate with a cache; where longrope changes its factors, the cache is made again."""
    ids = prompt.tolist()
    cache, cached = Cache(model.config.num_layers), 0
    switch = [r.original_max_positions for r in model.config.ropes if r.kind == "longrope"]
    for _ in range(count):
        if switch and cached <= switch[0] < len(ids):
            cache, cached = Cache(model.config.num_layers), 0
        positions = torch.arange(cached, len(ids))
        hidden = model.forward(
            torch.tensor(ids[cached:]),
            positions,
            cache,
            keep=torch.tensor([len(positions) - 1]),
            context_lens=torch.full_like(positions, len(ids)),
        )
        cached = len(ids)
        ids.append(int(model.logits(hidden)[0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family: str, build: Build) -> None:
    pair = build(family)
    worst = 0.0
    for length in (1, 5, 40, 90):  # beyond every window; 90 is beyond phi3-longrope's 48
        [ids] = ids_of(length)
        want = pair.reference(ids[None]).logits[0].float()
        [got] = packed_logits(pair.model, [ids])
        assert got.dtype == torch.float32
        assert float(want.std()) > 0.3, "logits are too flat to compare"
        worst = max(worst, error(got, want))
    assert worst < BOUND


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_sequences_equal_each_alone(family: str, build: Build) -> None:
    model = build(family).model
    sequences = ids_of(3, 17, 60, 16, 41, 17)
    for got, ids in zip(packed_logits(model, sequences), sequences, strict=True):
        [alone] = packed_logits(model, [ids])
        assert error(got, alone) < 1e-5  # products of fewer than 8 rows round differently


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, build: Build) -> None:
    pair = build(family)
    [prompt] = ids_of(11, seed=3)
    attention_mask = torch.ones(1, len(prompt), dtype=torch.int64)
    want = pair.reference.generate(
        prompt[None], attention_mask=attention_mask, max_new_tokens=64, do_sample=False
    )[0, len(prompt) :]
    assert greedy(pair.model, prompt, 64) == want.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_half_precision_is_as_close_as_transformers(
    family: str, dtype: torch.dtype, build: Build
) -> None:
    """Rounding may cost us at most twice what it costs transformers, plus one rounding."""
    pair = build(family)
    [ids] = ids_of(40)
    exact = pair.reference(ids[None]).logits[0]
    ours = Transformer.load(Checkpoint(pair.path), dtype=dtype)
    [got] = packed_logits(ours, [ids])
    theirs = error(pair.reference.to(dtype)(ids[None]).logits[0].float(), exact)
    assert error(got, exact) < 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family: str, build: Build) -> None:
    pair = build(family)
    sequences = ids_of(21, 40)
    for ids in sequences:
        (-pair.reference(ids[None]).logits[0, :-1].float().log_softmax(-1)).gather(
            1, ids[1:, None]
        ).sum().backward()
    model = pair.model
    for weight in model.parameters():
        weight.requires_grad_()
    for logits, ids in zip(packed_logits(model, sequences), sequences, strict=True):
        loss = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        loss.backward(retain_graph=True)
    layers = [
        Layer(**{k: t.grad for k, t in vars(layer).items() if t is not None})
        for layer in model.layers
    ]
    grads = Weights(model.embedding.grad, model.head.grad, model.final_norm.grad, layers)
    want = {name: weight.grad for name, weight in pair.reference.named_parameters()}
    for place in placements(model.config):
        assert error(view(grads, place), want[place.name]) < 1e-4, place.name
