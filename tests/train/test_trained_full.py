"""Full fine-tuning: its own copy of the weights, tiles apart, and a checkpoint that loads."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM
from fastsafe.errors import UsageError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import Transformer, nf4
from fastsafe.model.attention import PackedAttention
from fastsafe.train.optim import AdamW
from fastsafe.train.trained_full import TrainedFull
from fastsafe_kernels import token_logprobs


def tile(seed: int, lengths: tuple[int, ...] = (7, 12, 5)) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 96, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = torch.randint(0, 96, (sum(lengths),), generator=generator)
    return ids, positions, PackedAttention(list(lengths)), targets


def loss_of(model: Transformer, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -token_logprobs(model.logits(hidden), targets).sum()


def gradient(
    trained: TrainedFull, seed: int, to: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    ids, positions, attention, targets = tile(seed)
    project = trained.projection(gradient=to)
    hidden = project.model.forward(ids, positions, attention, project)
    loss = loss_of(project.model, hidden, targets) / len(targets)
    loss.backward()
    return loss.item(), project.gradient


def test_the_gradient_equals_finite_differences(llm: LLM) -> None:
    trained = TrainedFull(llm.model, llm.path)
    loss, found = gradient(trained, 0)
    rng = random.Random(0)
    largest = found.abs().topk(200).indices.tolist()
    for at in rng.sample(largest, 12):
        values = []
        kept = trained.flat[at].item()
        for step in (1e-2, -1e-2):
            trained.flat[at] = kept + step
            trained.refresh()
            values.append(gradient(trained, 0)[0])
        trained.flat[at] = kept
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(found[at].item(), rel=0.1)
    assert loss > 0


def test_the_base_is_left_alone_and_training_lowers_the_loss(llm: LLM) -> None:
    before = {name: t.clone() for name, t in llm.model.tensors().items()}
    trained = TrainedFull(llm.model, llm.path)
    optimizer = AdamW(trained.flat, 0.0, 1.0)
    losses = []
    for _ in range(8):
        loss, found = gradient(trained, 0)
        optimizer.step(found, 1e-3)
        trained.refresh()
        losses.append(loss)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, before[name]) for name, t in llm.model.tensors().items())
    changed = trained.model.tensors()
    assert all(not torch.equal(t, before[name]) for name, t in changed.items())


def test_tiles_keep_their_gradients_apart(llm: LLM) -> None:
    trained = TrainedFull(llm.model, llm.path)
    alone = [gradient(trained, seed)[1] for seed in (1, 2)]
    projections = [trained.projection() for _ in range(2)]
    losses = []
    for project, seed in zip(projections, (1, 2), strict=True):
        ids, positions, attention, targets = tile(seed)
        hidden = project.model.forward(ids, positions, attention, project)
        losses.append(loss_of(project.model, hidden, targets) / len(targets))
    for loss in losses:
        loss.backward()
    for project, expected in zip(projections, alone, strict=True):
        assert torch.equal(project.gradient, expected)


def test_parts_of_a_tile_add_up(llm: LLM) -> None:
    trained = TrainedFull(llm.model, llm.path)
    first, second = (gradient(trained, seed)[1] for seed in (1, 2))
    both = gradient(trained, 2, gradient(trained, 1)[1])[1]
    assert torch.equal(both, first + second)


def test_weights_of_another_dtype_follow_fp32_masters(checkpoint: Path) -> None:
    llm = LLM(checkpoint, dtype="bfloat16")
    trained = TrainedFull(llm.model, llm.path)
    assert trained.flat.dtype is torch.float32
    _, found = gradient(trained, 0)
    assert found.dtype is torch.float32
    assert found.isfinite().all()
    assert found.count_nonzero() > 0.5 * len(found)
    trained.flat += 1.0
    assert not torch.equal(trained.model.final_norm.float(), llm.model.final_norm.float() + 1)
    trained.refresh()
    assert torch.equal(trained.model.final_norm, (llm.model.final_norm.float() + 1).bfloat16())


def test_a_saved_checkpoint_loads(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    trained = TrainedFull(llm.model, checkpoint)
    trained.flat *= 1.01
    trained.save(tmp_path / "deep" / "tuned")
    again = LLM(tmp_path / "deep" / "tuned")
    for name, tensor in trained.model.tensors().items():
        assert torch.equal(again.model.tensors()[name], tensor), name
    assert again.tokenizer.encode("w5 w6") == llm.tokenizer.encode("w5 w6")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tuned"]


def test_the_saved_config_names_the_saved_dtype(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "run.py").write_text("1")
    TrainedFull(LLM(checkpoint, dtype="bfloat16").model, source).save(tmp_path / "tuned")
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert saved == config | {"torch_dtype": "bfloat16"}
    assert set(Checkpoint(tmp_path / "tuned").dtypes.values()) == {"BF16"}
    assert {p.name for p in (tmp_path / "tuned").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }


def test_a_quantized_base_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="base is quantized"):
        TrainedFull(nf4.load(Checkpoint(checkpoint)), checkpoint)


def test_a_tied_head_is_one_parameter() -> None:
    from fastsafe.organism import path

    model = Transformer.load(Checkpoint(path()))
    trained = TrainedFull(model, path())
    assert trained.model.head is trained.model.embedding
    assert len(trained.flat) == sum(t.numel() for t in model.tensors().values())
