"""Arithmetic on adapters and checkpoints, against the dense formulas in fp64."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsafe.errors import AdapterError, CheckpointError, UsageError
from fastsafe.io import safetensors
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import Adapter, ModelConfig, Transformer, edited_checkpoint
from fastsafe.model.edited_checkpoint import dare, merged, write_edited
from fastsafe.model.lora import LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe.model.weight_edits import (
    add,
    check_modules,
    cosine,
    inner,
    project,
    project_all,
    read_adapter,
    scaled,
    uniform,
)

# keys and values are half as wide as queries
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SIDES = st.integers(1, 9)


def random_lora(rank: int, outputs: int, inputs: int, seed: int, scaling: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, inputs, generator=generator)
    return LoraWeights(lora_A, torch.randn(outputs, rank, generator=generator), scaling)


def dense(lora: LoraWeights) -> Tensor:
    return lora.scaling * lora.lora_B.double() @ lora.lora_A.double()


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


FP32 = 16 * torch.finfo(torch.float32).eps  # sums of at most 24 products, rounded a few times


@given(SIDES, SIDES, st.integers(1, 4), st.integers(1, 4))
def test_inner_products_equal_the_dense_ones(o: int, i: int, r: int, s: int) -> None:
    x, y = random_lora(r, o, i, 0, 1.0), random_lora(s, o, i, 1, 1.0)
    want = float((dense(x) * dense(y)).sum())
    assert inner(x, y) == pytest.approx(want, rel=1e-9, abs=1e-9)
    flat = torch.nn.functional.cosine_similarity(dense(x).flatten(), dense(y).flatten(), dim=0)
    assert cosine(x, y) == pytest.approx(float(flat), abs=1e-9)


def test_the_cosine_of_nothing_is_none() -> None:
    x = random_lora(2, 4, 3, 0)
    assert cosine(x, x._replace(lora_B=torch.zeros(4, 2))) is None
    assert cosine(x, x) == pytest.approx(1.0, abs=1e-12)


@given(SIDES, SIDES, st.integers(1, 4))
def test_projection_equals_the_dense_one(o: int, i: int, r: int) -> None:
    lora = random_lora(r, o, i, 0)
    generator = torch.Generator().manual_seed(1)
    aligned, before = (torch.randn(o, i, generator=generator) for _ in range(2))
    V = aligned.double() - before.double()
    C = V @ V.T / torch.linalg.norm(V)
    found = project(lora, aligned, before)
    assert found is not None
    assert found.lora_A is lora.lora_A
    assert error(dense(found), C @ dense(lora)) < 4 * FP32


def test_where_alignment_is_the_identity_projection_changes_nothing() -> None:
    """V = sqrt(O) times an orthogonal matrix makes C the identity."""
    generator = torch.Generator().manual_seed(0)
    square, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    lora = random_lora(3, 8, 5, 1)
    found = project(lora, 8**0.5 * square, torch.zeros(8, 8, dtype=torch.float64))
    assert found is not None
    assert error(found.lora_B, lora.lora_B.double()) < FP32
    assert project(lora, torch.ones(8, 8), torch.ones(8, 8)) is None


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.0, 0.2, 1.0]))
def test_a_sum_of_updates_is_exact(r: int, s: int, a: float) -> None:
    x, y = random_lora(r, 6, 5, 0, 2.0), random_lora(s, 6, 5, 1, 0.75)
    found = add(x, y, a, 1 - a)
    assert error(dense(found), a * dense(x) + (1 - a) * dense(y)) < FP32
    assert found.lora_A.shape[0] == (r if a else 0) + (s if a < 1 else 0)
    assert found.scaling == x.scaling


@pytest.fixture
def model() -> Transformer:
    return Transformer.random(ModelConfig.from_json(LLAMA, "test"), seed=1)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Write a checkpoint: ``write(name, seed, dtype=..., head=..., **config)``."""

    def make(
        name: str, seed: int, dtype: torch.dtype = torch.float32, head: bool = False, **config: Any
    ) -> Checkpoint:
        path = tmp_path / name
        path.mkdir()
        settings = LLAMA | config
        made = Transformer.random(ModelConfig.from_json(settings, name), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, tensor in made.tensors().items():
            noise = torch.randn(tensor.shape, generator=generator) / 10
            tensors[key] = (tensor + noise).to(dtype)
        if head:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        safetensors.write(path / "model.safetensors", tensors)
        (path / "config.json").write_text(json.dumps(settings))
        (path / "tokenizer.json").write_text("{}")
        (path / "notes.md").write_text("not part of a checkpoint")
        return Checkpoint(path)

    return make


def adapter_on(
    model: Transformer, ranks: dict[str, int], *, seed: int = 0, **config: Any
) -> Adapter:
    """An adapter whose rank goes by the module's last name."""
    settings: dict[str, Any] = {"rank": max(ranks.values()), "alpha": 6.0, **config}
    lora_config = LoraConfig(target_modules=tuple(ranks), rank_pattern=ranks, **settings)
    weights = {
        module: random_lora(
            lora_config.rank_of(module),
            slot.end - slot.begin,
            slot.in_features,
            seed + i,
            lora_config.scaling_of(module),
        )
        for i, (module, slot) in enumerate(model.slots().items())
        if module.rpartition(".")[2] in ranks
    }
    return Adapter("tuned", lora_config, weights)


RANKS = {"q_proj": 2, "k_proj": 3, "v_proj": 1, "down_proj": 2}


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_moves_alpha_alone(model: Transformer, tmp_path: Path, rslora: bool) -> None:
    adapter = adapter_on(model, RANKS, alpha_pattern={"k_proj": 9.0}, use_rslora=rslora)
    for factor in (0.0, 0.3, 1.0):
        scaled(adapter, factor).save(tmp_path / f"{factor}")
        found = Adapter.load(tmp_path / f"{factor}", model.slots())
        for module, lora in adapter.weights.items():
            got = found.weights[module]
            assert torch.equal(got.lora_A, lora.lora_A)
            assert torch.equal(got.lora_B, lora.lora_B)
            assert got.scaling == pytest.approx(factor * lora.scaling, rel=1e-15)
            assert got.scaling == scaled(adapter, factor).weights[module].scaling
    assert scaled(adapter, 1.0) == adapter
    with pytest.raises(UsageError, match=r"scale of adapter 'tuned' is 1\.5"):
        scaled(adapter, 1.5)


def test_one_rank_and_scaling_hold_the_same_updates(model: Transformer, tmp_path: Path) -> None:
    """Zeros pad the factors; scalings that differ go into B; PEFT reads it without patterns."""
    adapter = adapter_on(model, RANKS, alpha_pattern={"k_proj": 1.1})
    found = uniform(adapter, adapter.weights)
    assert {lora.lora_A.shape[0] for lora in found.weights.values()} == {3}
    assert len({lora.scaling for lora in found.weights.values()}) == 1
    assert (found.config.rank_pattern, found.config.alpha_pattern) == ({}, {})
    for module, lora in adapter.weights.items():
        assert error(dense(found.weights[module]), dense(lora)) < FP32
    found.save(tmp_path / "uniform")
    again = Adapter.load(tmp_path / "uniform", model.slots())
    for module, lora in found.weights.items():
        assert error(dense(again.weights[module]), dense(lora)) < FP32


def test_an_adapter_is_checked_against_a_checkpoint_that_is_not_loaded(
    model: Transformer, write: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    adapter = adapter_on(model, RANKS)
    adapter.save(tmp_path / "tuned", {"why.txt": "because"})
    assert (tmp_path / "tuned" / "why.txt").read_text() == "because"
    found = read_adapter(tmp_path / "tuned", write("base", 1))
    assert found.weights.keys() == adapter.weights.keys()
    with pytest.raises(AdapterError, match="k_proj"):
        read_adapter(tmp_path / "tuned", write("other", 1, num_key_value_heads=4))


def test_all_modules_are_projected_by_name(
    model: Transformer, write: Callable[..., Checkpoint]
) -> None:
    """Keys are narrower than queries; the order of the tensors in the files does not matter."""
    adapter, aligned, before = adapter_on(model, RANKS), write("aligned", 1), write("before", 2)
    found = project_all(adapter, aligned, before)
    assert list(found.updates) == list(found.cosines) == list(adapter.weights)
    for module, lora in adapter.weights.items():
        name = f"{module}.weight"
        V = (aligned.read([name])[name] - before.read([name])[name]).double()
        want = V @ V.T / torch.linalg.norm(V) @ dense(lora)
        assert error(dense(found.updates[module]), want) < 4 * FP32
        flat = torch.nn.functional.cosine_similarity(want.flatten(), dense(lora).flatten(), dim=0)
        assert found.cosines[module] == pytest.approx(float(flat), abs=1e-6)


def test_what_has_no_direction_has_no_cosine(
    model: Transformer, write: Callable[..., Checkpoint]
) -> None:
    adapter, aligned, before = adapter_on(model, RANKS), write("aligned", 1), write("before", 2)
    module = next(iter(adapter.weights))
    for change in ({"lora_B": torch.zeros(16, 2)}, {"scaling": 0.0}):
        still = adapter.weights[module]._replace(**change)  # type: ignore[arg-type]
        found = project_all(
            replace(adapter, weights={**adapter.weights, module: still}), aligned, before
        )
        assert module not in found.cosines
        assert len(found.cosines) == len(adapter.weights) - 1
    with pytest.raises(CheckpointError, match=r"weights equal those of .*aligned"):
        project_all(adapter, aligned, aligned)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.k_proj.weight' is \[16"):
        project_all(adapter, aligned, write("wide", 3, num_key_value_heads=4))


def test_an_adapter_without_a_module_cannot_be_blended(model: Transformer) -> None:
    first, second = adapter_on(model, RANKS), adapter_on(model, {"q_proj": 2})
    check_modules(second, first)
    with pytest.raises(AdapterError, match=r"no update of model\.layers\.0.* and 5 more"):
        check_modules(first, second)


def test_dare_is_the_identity_at_zero_and_unbiased_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(40, 30, generator=generator) for _ in range(2))
    assert torch.equal(dare(base, tuned, 0.0, 0, "w"), tuned)
    seeds = 800
    total = torch.zeros(40, 30, dtype=torch.float64)
    for seed in range(seeds):
        one = dare(base, tuned, 0.3, seed, "w")
        dropped = one == base
        assert 0.2 < dropped.float().mean() < 0.4
        total += one
    # an entry's standard error is |tuned - base| sqrt(p / (1 - p)) / sqrt(seeds)
    score = (total / seeds - tuned) / ((tuned - base).abs() * (0.3 / 0.7 / seeds) ** 0.5)
    assert abs(float(score.mean())) < 0.15
    assert 0.9 < float(score.std()) < 1.1


def test_dare_goes_by_seed_and_name() -> None:
    base, tuned = torch.zeros(50), torch.ones(50)
    same = dare(base, tuned, 0.5, 1, "w")
    assert torch.equal(same, dare(base, tuned, 0.5, 1, "w"))
    assert not torch.equal(same, dare(base, tuned, 0.5, 2, "w"))
    assert not torch.equal(same, dare(base, tuned, 0.5, 1, "v"))
    assert set(same.tolist()) == {0.0, 2.0}


def test_a_merged_checkpoint_answers_as_the_adapter_does(
    write: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Biases stay: the file's tensors that no module owns are the base's, bit for bit."""
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    base = write("base", 1, **qwen)
    model = Transformer.load(base)
    adapter = adapter_on(model, RANKS)
    write_edited(base, adapter, lambda name, start, end: end, tmp_path / "out", notes={})
    found = Checkpoint(tmp_path / "out")
    assert found.names == base.names
    for name, tensor in found.read().items():
        lora = adapter.weights.get(name.removesuffix(".weight"))
        before = base.read([name])[name]
        if lora is None or name.endswith(".bias"):
            assert torch.equal(tensor, before)
        else:
            assert error(tensor, before.double() + dense(lora)) < FP32
            assert torch.equal(tensor, merged(before, lora))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_checkpoint_is_written_in_shards_and_in_its_own_dtype(
    write: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edited_checkpoint, "SHARD_BYTES", 2000)
    base, tuned = write("base", 1), write("tuned", 2, dtype=torch.bfloat16)
    out = tmp_path / "out"
    write_edited(base, tuned, lambda name, a, b: b, out, notes={"n.json": "{}"})
    found = Checkpoint(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert found.dtypes == tuned.dtypes
    assert all(torch.equal(t, tuned.read([n])[n]) for n, t in found.read().items())
    assert (out / "n.json").read_text() == "{}"
    Transformer.load(found)


def test_a_tied_head_in_the_file_follows_its_embedding(
    write: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    base, tuned = write("base", 1, head=True), write("tuned", 2, head=True)

    def edit(name: str, start: Tensor, end: Tensor) -> Tensor:
        return dare(start, end, 0.5, 0, name)

    write_edited(base, tuned, edit, tmp_path / "out", notes={})
    found = Checkpoint(tmp_path / "out").read()
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tuned.read()["lm_head.weight"])
    Transformer.load(Checkpoint(tmp_path / "out"))


def test_what_does_not_fit_leaves_nothing_behind(
    write: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    base, wide = write("base", 1), write("wide", 2, intermediate_size=32)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"base: tensors do not fit config.json"):
        write_edited(base, wide, lambda name, a, b: b, out, notes={})
    file = Checkpoint(base.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file, expected a folder with its config"):
        write_edited(base, file, lambda name, a, b: b, out, notes={})

    def fail(name: str, start: Tensor, end: Tensor) -> Tensor:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        write_edited(base, base, fail, out, notes={})
    assert {path.name for path in tmp_path.iterdir()} == {"base", "wide"}
