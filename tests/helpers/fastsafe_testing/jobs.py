"""Rows, jobs and comparisons of the training tests."""

import random
from pathlib import Path
from typing import Any

import torch

from fastsafe import FinetuneJob, TrainConfig
from fastsafe.io import safetensors
from fastsafe.train import FinetuneResult


def rows(count: int, seed: int = 0, safety: int = 0) -> list[dict[str, Any]]:
    """Random token rows; the last ``safety`` of them are safety rows."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(96) for _ in range(rng.randint(low, high))]

    made = [{"prompt": draw(3, 40), "completion": draw(1, 12)} for _ in range(count)]
    for row in made[count - safety :] if safety else []:
        row["source"] = "safety"
    return made


def weights(folder: Path | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return safetensors.read(folder / "adapter_model.safetensors")


def assert_same(a: FinetuneResult, b: FinetuneResult) -> None:
    """Same losses and same bits of every weight."""
    assert a.error is None
    assert a.losses == b.losses
    assert a.num_tokens == b.num_tokens
    assert a.stopped_early == b.stopped_early
    ours, theirs = weights(a.adapter_dir), weights(b.adapter_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def job(name: str, seed: int = 0, count: int = 20, **options: Any) -> FinetuneJob:
    """A small job; 6 of its rows are safety rows."""
    config = {"max_steps": 4, "batch_size": 4, "learning_rate": 3e-3, "seed": seed, **options}
    return FinetuneJob(name, rows(count, seed, safety=6), TrainConfig(**config))
