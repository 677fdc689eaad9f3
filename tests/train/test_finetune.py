"""finetune: many jobs equal each job alone, and what a user can get wrong."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.errors import AdapterError, DataError, StoreError, UsageError
from fastsafe.io import safetensors


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(96) for _ in range(rng.randint(low, high))]

    return [{"prompt": draw(3, 40), "completion": draw(1, 12)} for _ in range(count)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.read(folder / "adapter_model.safetensors")


JOBS = [
    FinetuneJob("one", rows(30, 1), TrainConfig(max_steps=6, learning_rate=5e-3)),
    FinetuneJob("long", rows(50, 2), TrainConfig(max_steps=9, rank=3, alpha=7, loss_on="all")),
    FinetuneJob("drop", rows(20, 3), TrainConfig(max_steps=5, dropout=0.3, batch_size=40)),
    FinetuneJob(
        "few",
        rows(9, 4),
        TrainConfig(epochs=2, batch_size=4, target_modules=["q_proj", "down_proj"], seed=3),
    ),
]


def test_a_job_among_others_equals_the_job_alone(llm: LLM, tmp_path: Path) -> None:
    """Same losses and same bits of every weight."""
    together = finetune(llm, JOBS, tmp_path / "together")
    for job, result in zip(JOBS, together, strict=True):
        (alone,) = finetune(llm, [job], tmp_path / "alone")
        assert alone.losses == result.losses
        ours, theirs = weights(alone.adapter_dir), weights(result.adapter_dir)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_threads_do_not_change_bits(llm: LLM, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(finetune(llm, JOBS[:3], tmp_path / str(count)))
    finally:
        torch.set_num_threads(threads)
    assert [r.losses for r in results[0]] == [r.losses for r in results[1]]


def test_result_loads_and_changes_answers(llm: LLM, tmp_path: Path) -> None:
    examples = [{"prompt": [5, i], "completion": [7, 8, 9, 1]} for i in range(10, 60)]
    config = TrainConfig(max_steps=60, learning_rate=2e-3, rank=8)
    steps: list[tuple[int, dict[str, float]]] = []
    (result,) = finetune(
        llm,
        [FinetuneJob("habit", examples, config)],
        tmp_path,
        on_step=lambda step, losses: steps.append((step, dict(losses))),
    )
    assert result.adapter_dir == tmp_path / "habit"
    assert [s for s, _ in steps] == list(range(60))
    assert tuple(losses["habit"] for _, losses in steps) == result.losses
    assert result.losses[-1] < 0.1 * result.losses[0]
    llm.load_adapter(result.adapter_dir)
    base, tuned = llm.generate([[5, 70]] * 2, adapters=[None, "habit"])
    assert tuned.token_ids == (7, 8, 9, 1)
    assert base.token_ids[:4] != (7, 8, 9, 1)
    assert result.num_tokens == 6 * 60 * 16 - _missing(60, 50)


def _missing(steps: int, count: int) -> int:
    """Tokens that smaller last batches of an epoch lack."""
    full = -(-count // 16)
    return 6 * sum(16 - (count - 16 * (full - 1)) for s in range(steps) if s % full == full - 1)


def test_seed_decides_initial_weights_and_order(llm: LLM, tmp_path: Path) -> None:
    def losses(name: str, **options: Any) -> tuple[float, ...]:
        config = TrainConfig(max_steps=3, batch_size=4, **options)
        return finetune(llm, [FinetuneJob(name, rows(20), config)], tmp_path)[0].losses

    assert losses("a", seed=0) == losses("b", seed=0)
    assert losses("a", seed=0) != losses("b", seed=1)
    assert losses("a", seed=0) != losses("b", seed=0, shuffle=False)


def test_every_epoch_sees_every_row_once(llm: LLM, tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, batch_size=8)
    assert config.num_steps(20) == 9
    (result,) = finetune(llm, [FinetuneJob("a", rows(20), config)], tmp_path)
    per_epoch = sum(len(r["prompt"]) + len(r["completion"]) for r in rows(20))
    assert result.num_tokens == 3 * per_epoch
    assert len(result.losses) == 9


def test_no_adapter_without_training_changes_nothing(llm: LLM, tmp_path: Path) -> None:
    """B starts at zero: an untrained adapter changes no bit."""
    config = TrainConfig(max_steps=1, learning_rate=0.0)
    (result,) = finetune(llm, [FinetuneJob("zero", rows(4), config)], tmp_path)
    llm.load_adapter(result.adapter_dir)
    assert torch.equal(llm.logits([3, 4, 5], "zero"), llm.logits([3, 4, 5]))


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (FinetuneJob("../up", rows(2), TrainConfig()), UsageError, "job name '../up'"),
        (FinetuneJob("", rows(2), TrainConfig()), UsageError, "job name ''"),
        (FinetuneJob("..", rows(2), TrainConfig()), UsageError, "job name '..'"),
        (FinetuneJob("a\0b", rows(2), TrainConfig()), UsageError, "cannot name a directory"),
        (FinetuneJob("n" * 300, rows(2), TrainConfig()), UsageError, "at most 128 letters"),
        (FinetuneJob("a", [], TrainConfig()), UsageError, "has no rows"),
        (
            FinetuneJob("a", [{"prompt": [3] * 100, "completion": [3] * 100}], TrainConfig()),
            UsageError,
            "a row of 200 tokens, the model takes 128",
        ),
        (FinetuneJob("a", [{"question": "x"}], TrainConfig()), DataError, "a: row 0"),
        (
            FinetuneJob("a", rows(2), TrainConfig(target_modules=["c_attn"])),
            AdapterError,
            "'c_attn', which the base model lacks",
        ),
    ],
)
def test_wrong_jobs_are_one_sentence(
    llm: LLM, tmp_path: Path, job: FinetuneJob, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(llm, [job], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 8.5}, "rank is 8.5, expected an integer"),
        ({"rank": "8"}, "rank is '8', expected an integer"),
        ({"max_steps": 2.5}, "max_steps is 2.5, expected an integer"),
        ({"learning_rate": 1e38}, r"learning_rate is 1e\+38, expected in \[0, 10\]"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', expected a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"loss_on": "prompt"}, "loss_on is 'prompt'"),
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_wrong_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


def test_schedules_follow_their_formulas() -> None:
    def rates(schedule: Any) -> list[float]:
        config = TrainConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2)
        return [round(config.learning_rate_at(s, 6), 6) for s in range(6)]

    assert rates("constant") == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear") == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine") == [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]


def test_epochs_are_not_rounded_up_by_a_bit() -> None:
    assert TrainConfig(epochs=1.1, batch_size=1).num_steps(50) == 55
    assert TrainConfig(epochs=0.5, batch_size=4).num_steps(9) == 2


def test_huge_seeds_work(llm: LLM, tmp_path: Path) -> None:
    config = TrainConfig(max_steps=1, seed=2**70)
    assert finetune(llm, [FinetuneJob("a", rows(4), config)], tmp_path)[0].losses


def test_two_trainings_into_one_folder_are_refused(llm: LLM, tmp_path: Path) -> None:
    """The second one would delete what the first one is writing."""
    job = FinetuneJob("one", rows(30, 1), TrainConfig(max_steps=1))
    refused: list[str] = []

    def second(step: int, losses: Mapping[str, float]) -> None:
        with pytest.raises(StoreError, match="is in use by process") as caught:
            finetune(llm, [job], tmp_path)
        refused.append(str(caught.value))

    (result,) = finetune(llm, [job], tmp_path, second)
    assert (len(refused), result.error) == (1, None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]
