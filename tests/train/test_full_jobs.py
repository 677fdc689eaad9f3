"""Jobs of method "full": whole checkpoints, beside adapters, resumed, and the base left alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.errors import UsageError
from fastsafe.train import TrainOptions
from fastsafe.train.loop import prepare
from fastsafe.train.loss import token_loss
from fastsafe.train.memory import plan_memory
from fastsafe_kernels import token_logprobs


def rows(count: int, seed: int = 0, **keys: Any) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randint(2, 95) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [{"prompt": draw(2, 30), "completion": draw(1, 12), **keys} for _ in range(count)]


def config(**changes: Any) -> TrainConfig:
    few = {"method": "full", "max_steps": 4, "batch_size": 8, "learning_rate": 1e-3}
    return TrainConfig(**few | changes)


def test_a_whole_model_is_trained_and_loads(llm: LLM, tmp_path: Path) -> None:
    before = {name: t.clone() for name, t in llm.model.tensors().items()}
    (result,) = finetune(llm, [FinetuneJob("full", rows(24), config())], tmp_path)
    assert result.error is None
    assert result.adapter_dir == tmp_path / "full"
    assert result.losses[-1] < result.losses[0]
    tuned = LLM(result.adapter_dir).model.tensors()
    for name, tensor in llm.model.tensors().items():
        assert torch.equal(tensor, before[name]), "the base is not touched"
        assert not torch.equal(tuned[name], tensor), name


def test_it_is_the_same_alone_and_among_adapters(llm: LLM, tmp_path: Path) -> None:
    jobs = [
        FinetuneJob("lora", rows(20, 1), config(method="lora", rank=4)),
        FinetuneJob("full", rows(24), config()),
        FinetuneJob("other", rows(16, 2), config(weight_decay=0.1, max_steps=3)),
    ]
    together = finetune(llm, jobs, tmp_path / "together")
    for job, among in zip(jobs, together, strict=True):
        (alone,) = finetune(llm, [job], tmp_path / "alone")
        assert alone.losses == among.losses
        for file in sorted(alone.adapter_dir.iterdir()):
            assert file.read_bytes() == (among.adapter_dir / file.name).read_bytes(), file


def test_it_is_resumed_exactly(llm: LLM, tmp_path: Path) -> None:
    job = FinetuneJob("full", rows(24), config(max_steps=6))
    (whole,) = finetune(llm, [job], tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step: int, losses: Any) -> None:
        if step == 4:
            raise Stop

    options = TrainOptions(checkpoint_every=2, resume=True)
    with pytest.raises(Stop):
        finetune(llm, [job], tmp_path / "cut", stop, options=options)
    assert not (tmp_path / "cut" / "full").exists()
    seen = []
    (again,) = finetune(
        llm, [job], tmp_path / "cut", lambda step, _: seen.append(step), options=options
    )
    assert again.losses == whole.losses
    assert len(seen) == 2
    for file in whole.adapter_dir.iterdir():
        assert file.read_bytes() == (again.adapter_dir / file.name).read_bytes()
    (done,) = finetune(
        llm, [job], tmp_path / "cut", lambda *_: pytest.fail("done"), options=options
    )
    assert done.adapter_dir == again.adapter_dir


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dropout is 0.1, expected 0 where method is 'full'"):
        config(dropout=0.1)
    with pytest.raises(UsageError, match="method is 'half'"):
        config(method="half")
    with pytest.raises(UsageError, match="expected 'lora' for objective 'freeze_layers'"):
        config(objective={"name": "freeze_layers", "layers": [0]})


@pytest.mark.parametrize("objective", ["lisa", "ema", "first_token_kl", "constrained_sft"])
def test_objectives_go_with_it(llm: LLM, tmp_path: Path, objective: str) -> None:
    safety = rows(8, 3, source="safety")
    jobs = [
        FinetuneJob(name, rows(8) + safety, config(objective=o))
        for name, o in (("plain", "sft"), ("defended", objective))
    ]
    plain, defended = finetune(llm, jobs, tmp_path)
    assert defended.error is None
    weights = [(r.adapter_dir / "model.safetensors").read_bytes() for r in (plain, defended)]
    assert weights[0] != weights[1]


def test_the_head_gets_the_gradient_of_every_chunk(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsafe.train import loss as module

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 96 * 5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 256, generator=generator)
    targets, weights = torch.arange(13), torch.rand(13, generator=generator)
    head = llm.model.head.clone().requires_grad_()
    llm.model.head = head
    leaf = hidden.clone().requires_grad_()
    got = torch.autograd.grad(token_loss(leaf, targets, llm.model, weights).sum(), (leaf, head))
    plain = -(token_logprobs(llm.model.logits(leaf), targets) * weights).sum()
    for found, expected in zip(got, torch.autograd.grad(plain, (leaf, head)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_its_memory_is_planned(llm: LLM) -> None:
    runs = prepare(llm, [FinetuneJob("full", rows(8), config())])
    (job,) = plan_memory(llm.model, runs, TrainOptions()).jobs
    size = sum(t.numel() for t in llm.model.parameters())
    assert job.adapter_bytes == 16 * size
    assert job.gradient_bytes == 8 * size
