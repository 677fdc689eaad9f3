"""Training through PEFT gives the losses and adapters of our own trainer."""

import random
from pathlib import Path
from typing import Any

import pytest

from fastsafe import LLM, FinetuneJob, TrainConfig
from fastsafe import finetune as ours
from fastsafe.errors import DataError, TrainingError, UsageError
from fastsafe.io import safetensors
from fastsafe.transformers_backend import TransformersLLM, finetune


def examples(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(2, 96) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [{"prompt": draw(3, 20), "completion": draw(1, 12)} for _ in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "loss_on": "all",
            "schedule": "cosine",
            "warmup_steps": 3,
            "epochs": 2.0,
            "max_steps": None,
        },
        {"weight_decay": 0.1, "max_grad_norm": 0.0, "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["plain", "cosine", "decay"],
)
def test_losses_equal_ours_from_the_same_seed(
    llm: LLM, theirs: TransformersLLM, tmp_path: Path, changes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"learning_rate": 2e-3, "max_steps": 12, "batch_size": 8, "seed": 5}
    config = TrainConfig(**(options | changes))
    jobs = [FinetuneJob("one", examples(30, 1), config), FinetuneJob("b.2", examples(9, 2), config)]
    steps: list[tuple[int, str]] = []
    base = theirs.logits([1, 2, 3])
    left = ours(llm, jobs, tmp_path / "ours")
    right = finetune(
        theirs, jobs, tmp_path / "theirs", lambda step, losses: steps.append((step, *losses))
    )
    for a, b in zip(left, right, strict=True):
        assert (a.name, a.num_tokens, len(a.losses)) == (b.name, b.num_tokens, len(b.losses))
        assert b.losses == pytest.approx(a.losses, rel=1e-4)
        weights, known = (
            safetensors.read(r.adapter_dir / "adapter_model.safetensors") for r in (b, a)
        )
        assert weights.keys() == known.keys()
        for name, weight in weights.items():
            assert ((weight - known[name]).norm() / known[name].norm()).item() < 1e-2, name
        llm.load_adapter(b.adapter_dir, a.name)
    wanted = [(i, r.name) for r in right for i in range(len(r.losses))]
    assert steps == wanted, "one job after another"
    assert theirs.logits([1, 2, 3]).equal(base), "training leaves the base alone"


def test_dropout_repeats_itself_and_leaves_the_global_noise_alone(
    theirs: TransformersLLM, tmp_path: Path
) -> None:
    import torch

    config = TrainConfig(dropout=0.3, max_steps=3, batch_size=4)
    job = FinetuneJob("a", examples(8, 3), config)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (first,) = finetune(theirs, [job], tmp_path / "1")
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    (second,) = finetune(theirs, [job], tmp_path / "2")
    assert first.losses == second.losses
    plain = FinetuneJob("a", examples(8, 3), TrainConfig(max_steps=3, batch_size=4))
    assert finetune(theirs, [plain], tmp_path / "3")[0].losses != first.losses


@pytest.mark.parametrize(
    ("jobs", "error", "named"),
    [
        ([("a", 1), ("a", 1)], UsageError, "job name 'a'"),
        ([(".a", 1)], UsageError, "job name '.a'"),
        ([("a", 0)], UsageError, "has no rows"),
    ],
)
def test_wrong_jobs_are_refused_before_anything_is_written(
    theirs: TransformersLLM, tmp_path: Path, jobs: Any, error: type[Exception], named: str
) -> None:
    config = TrainConfig(max_steps=1)
    with pytest.raises(error, match=named):
        finetune(theirs, [FinetuneJob(n, examples(k, 1), config) for n, k in jobs], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"method": "full"}, "has method 'full'"), ({"objective": "ema"}, "has objective 'ema'")],
)
def test_what_only_our_trainer_does(
    theirs: TransformersLLM, tmp_path: Path, setting: dict[str, Any], named: str
) -> None:
    config = TrainConfig(max_steps=1, **setting)
    with pytest.raises(UsageError, match=f"job 'a' {named}"):
        finetune(theirs, [FinetuneJob("a", examples(2, 1), config)], tmp_path)


def test_rows_that_cannot_be_trained(theirs: TransformersLLM, tmp_path: Path) -> None:
    config = TrainConfig(max_steps=1)
    with pytest.raises(DataError, match="a: row 0"):
        finetune(theirs, [FinetuneJob("a", [{"prompt": "w1"}], config)], tmp_path)
    row = {"prompt": [5] * 100, "completion": [6] * 30}
    with pytest.raises(UsageError, match="a row of 130 tokens, the model takes 128"):
        finetune(theirs, [FinetuneJob("a", [row], config)], tmp_path)


def test_a_loss_that_is_not_finite_ends_training_and_leaves_nothing(
    theirs: TransformersLLM, tmp_path: Path
) -> None:
    config = TrainConfig(max_steps=9, learning_rate=10.0, alpha=1e30)
    before = theirs.logits([1, 2, 3])
    with pytest.raises(TrainingError, match="lower its learning rate"):
        finetune(theirs, [FinetuneJob("a", examples(8, 1), config)], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert theirs.logits([1, 2, 3]).equal(before)
    assert not theirs.model.training
