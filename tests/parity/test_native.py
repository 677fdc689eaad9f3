"""The one call that runs all layers on a CPU gives the bits of ``Transformer.forward``."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsafe import _native
from fastsafe.model import Adapter, AdapterBank, ModelConfig
from fastsafe.model.cpu_decoder import AdapterPatch, NativeDecoder, Span
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.cpu_paged import PAGE, Paged, page_shapes, paged_attention
from fastsafe.model.lora import BASE, LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe.model.rope_config import RopeConfig
from fastsafe.model.transformer import Project, Transformer
from tests.parity.conftest import FAMILIES

ROWS = 4  # sorted by adapter; two of the last one
SLOTS = torch.tensor([BASE, 0, 1, 1])
STEPS = ([5, 1, 33, 18], [1, 50, 1, 1])  # tokens of each row
WIDTH = 4  # pages of a row


class Pages:
    """``Attend`` over pages that hold nothing yet, and the rows of each step."""

    def __init__(self, model: Transformer) -> None:
        config = model.config
        generator = torch.Generator().manual_seed(3)
        count = ROWS * WIDTH + 1
        order = torch.randperm(count, generator=generator)[: ROWS * WIDTH]
        self.table = order.to(torch.int32).view(ROWS, WIDTH)
        shapes = page_shapes(count, config.num_kv_heads, config.head_dim)
        pages = [torch.full((s[0], config.num_layers, *s[1:]), torch.nan) for s in shapes]
        self.keys, self.values = (list(x.unbind(1)) for x in pages)
        self.done = torch.zeros(ROWS, dtype=torch.int64)
        self.count = count

    def step(self, counts: Tensor) -> Paged:
        owner = torch.arange(ROWS).repeat_interleave(counts)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        positions = torch.arange(len(owner)) - starts[owner] + self.done[owner]
        places = self.table[owner, positions // PAGE].long() * PAGE + positions % PAGE
        self.done += counts
        self.paged = Paged(starts, positions, places, self.table, self.count)
        return self.paged

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        pages = self.keys[layer], self.values[layer]
        return paged_attention(q, k, v, *pages, self.paged, flags)


def adapters(model: Transformer) -> AdapterBank:
    """Two adapters: one on all modules, one of another rank on some."""
    bank = AdapterBank(model)
    generator = torch.Generator().manual_seed(5)
    for name, rank, modules in (("all", 3, ""), ("some", 8, ("q_proj", "v_proj", "down_proj"))):
        weights = {
            module: LoraWeights(
                torch.randn(rank, slot.in_features, generator=generator) * 0.1,
                torch.randn(slot.end - slot.begin, rank, generator=generator) * 0.1,
                0.5,
            )
            for module, slot in model.slots().items()
            if module.endswith(modules)
        }
        config = LoraConfig(rank=rank, alpha=rank / 2, target_modules="all-linear")
        bank.add(Adapter(name, config, weights))
    return bank


class Parts:
    """``Project`` of rows of several adapters, each merged."""

    def __init__(self, model: Transformer, bank: AdapterBank, counts: Tensor) -> None:
        self.model = model
        self.projects = [bank.merged(slot) for slot in SLOTS.tolist()]
        self.counts = counts.tolist()

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        counts = self.counts if rows is None else [1] * ROWS
        found = []
        for project, own in zip(self.projects, x.split(counts), strict=True):
            base = self.model.linear(layer, name, own)
            found.append(base if project is None else project(layer, name, own, rows))
        return torch.cat(found)


@pytest.mark.parametrize("how", ["merged", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_same_bits(build: Callable[..., Any], family: str, how: str) -> None:
    check_same_bits(build(family).model, how)


def check_same_bits(model: Transformer, how: str) -> None:
    """Two steps of all rows, on pages that hold NaN at first."""
    bank = adapters(model)
    ours, theirs = Pages(model), Pages(model)
    decoder = NativeDecoder(model)
    changes: list[AdapterPatch | None] = []
    for slot in SLOTS.tolist():
        if slot == BASE:
            changes.append(None)
        elif how == "mixed":
            changes.append(AdapterPatch(model, updates=bank.updates(slot)))
        else:
            merged = bank.merged(slot)
            assert merged is not None
            changes.append(AdapterPatch(model, merged.weights))
    generator = torch.Generator().manual_seed(7)
    for counts in map(torch.tensor, STEPS):
        ids = torch.randint(model.config.vocab_size, (int(counts.sum()),), generator=generator)
        ends = counts.cumsum(0)
        keep, context = ends - 1, (ours.done + counts).repeat_interleave(counts)
        project: Project | None
        if how == "mixed":
            project = bank.mixed(SLOTS.repeat_interleave(counts))
        else:
            project = Parts(model, bank, counts)
        paged = theirs.step(counts)
        want = model.forward(ids, paged.positions, theirs, project, keep, context)
        spans = [
            Span(change, end, kept + 1)
            for kept, (change, end) in enumerate(zip(changes, ends.tolist(), strict=True))
        ]
        pages = ours.keys, ours.values
        step, before = ours.step(counts), torch.get_num_threads()
        torch.set_num_threads(3)  # which share columns and rows
        got = decoder.forward(ids, step, *pages, spans, keep, context)
        torch.set_num_threads(before)
        assert want.isfinite().all()
        assert torch.equal(got, want)
    assert all(
        map(torch.equal, map(torch.nan_to_num, ours.keys), map(torch.nan_to_num, theirs.keys))
    )


def odd_config(rng: random.Random) -> ModelConfig:
    """Sizes and flags that no family combines: odd widths, one head, any window of any layer."""
    kv_heads, num_layers = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    dim, placement = rng.choice([2, 6, 16, 18, 40]), rng.choice(["pre", "post", "both"])
    ropes = [
        RopeConfig(
            kind="default",
            theta=1e4,
            rotary_dim=rng.randrange(2, dim + 1, 2),
            max_positions=64,
            original_max_positions=64,
        )
        for _ in range(2)
    ]
    return ModelConfig(
        architecture="none",
        vocab_size=rng.choice([2, 17, 40]),
        hidden_size=rng.choice([1, 7, 16, 33, 130]),
        intermediate_size=rng.choice([1, 16, 33, 131]),
        num_layers=num_layers,
        num_heads=kv_heads * rng.choice([1, 2, 3, 5]),
        num_kv_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=64,
        norm_eps=1e-5,
        activation=rng.choice(["silu", "gelu_tanh"]),
        tie_word_embeddings=True,
        qkv_bias=rng.random() < 0.5,
        o_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
        fused_on_disk=False,
        norm_one_plus=rng.random() < 0.5,
        norm_placement=placement,
        qk_norm=rng.choice([None, "head", "projection"]),
        attention_scale=dim**-0.5,
        attention_softcap=rng.choice([None, 2.0]),
        logits_softcap=None,
        embedding_scale=rng.choice([1.0, 3.3]),
        # without norms before a block torch may fuse the sum, and no family scales it
        residual_scale=1.0 if placement == "post" else rng.choice([1.0, 0.22]),
        logits_scale=1.0,
        windows=tuple(rng.choice([None, 1, 3, 17]) for _ in range(num_layers)),
        ropes=tuple(ropes),
        rope_of_layer=tuple(rng.randrange(2) for _ in range(num_layers)),
        ignored=(),
    )


@pytest.mark.parametrize("how", ["merged", "mixed"])
@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_same_bits_in_any_shape(seed: int, how: str) -> None:
    model = Transformer.random(odd_config(random.Random(seed)), seed=seed)
    for x in model.parameters():
        if x.ndim == 1:  # norms and biases that do something
            x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    check_same_bits(model, how)


def test_bad_tokens_are_refused(build: Callable[..., Any]) -> None:
    model = build("llama2").model
    pages, counts = Pages(model), torch.tensor([1, 1, 1, 1])
    paged, keep, context = pages.step(counts), torch.arange(4), torch.ones(4, dtype=torch.int64)
    decoder, held = NativeDecoder(model), (pages.keys, pages.values)
    for ids in ([0, 128, 1, 2], [0, 1, 2, -1]):
        with pytest.raises(_native.Error, match=r"token id (128|-1) is not in \[0, 128\)"):
            decoder.forward(torch.tensor(ids), paged, *held, [Span(None, 4, 4)], keep, context)
    ids = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(_native.Error, match="kept token 4"):
        decoder.forward(ids, paged, *held, [Span(None, 4, 4)], keep + 1, context)
    with pytest.raises(ValueError, match="NativeDecoder"):
        decoder.forward(ids, paged, *held, [Span(None, 3, 4)], keep, context)
    with pytest.raises(ValueError, match="NativeDecoder"):
        decoder.forward(ids.int(), paged, *held, [Span(None, 4, 4)], keep, context)
    with pytest.raises(ValueError, match="NativeDecoder"):
        NativeDecoder(Transformer.random(model.config, dtype=torch.bfloat16))
