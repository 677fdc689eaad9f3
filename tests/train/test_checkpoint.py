"""Checkpoints: killed and resumed equals unbroken, bit for bit; what does not fit is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.errors import CheckpointError, UsageError
from fastsafe.io import safetensors
from fastsafe.train import FinetuneResult, TrainOptions
from fastsafe.train.checkpoint import FOLDER
from fastsafe_testing import killed
from fastsafe_testing.jobs import assert_same, job, rows

SCRIPT = Path(killed.__file__)
EVERY = TrainOptions(checkpoint_every=2, resume=True)


class Killed(Exception):
    """Stands for the end of the process."""


def train_and_die(llm: LLM, out: Path, step: int, **options: Any) -> None:
    def die(at: int, losses: Any) -> None:
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        finetune(llm, killed.jobs(), out, die, options=TrainOptions(**options))


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[FinetuneResult]:
    """The jobs without a monitor, trained in one go."""
    return killed.train(LLM(checkpoint), tmp_path_factory.mktemp("unbroken"))


def test_killed_and_resumed_equals_unbroken(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL at random writes, again and again."""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(out), "0"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 3, "the processes must have been killed"
    results = killed.train(llm, out, killed.MONITOR, resume=True)
    unbroken = killed.train(llm, tmp_path / "unbroken", killed.MONITOR)
    for ours, theirs in zip(results, unbroken, strict=True):
        assert_same(ours, theirs)
    assert {r.stopped_early for r in unbroken} == {False, True}
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("step", [0, 8, 13])
def test_resumed_in_process(
    llm: LLM, tmp_path: Path, unbroken: list[FinetuneResult], step: int
) -> None:
    """Between checkpoints, at one, and with jobs that wait, run or are done."""
    train_and_die(llm, tmp_path / "out", step, max_jobs=2, checkpoint_every=3)
    results = killed.train(llm, tmp_path / "out", resume=True, checkpoint_every=3)
    for ours, theirs in zip(results, unbroken, strict=True):
        assert_same(ours, theirs)


def test_done_jobs_are_not_trained_again(llm: LLM, tmp_path: Path) -> None:
    jobs = [job("a"), job("b", seed=1)]
    first = finetune(llm, jobs, tmp_path, options=EVERY)
    stamps = [(r.adapter_dir / "adapter_model.safetensors").stat().st_mtime_ns for r in first]  # type: ignore[operator]
    steps: list[int] = []
    again = finetune(llm, jobs, tmp_path, lambda step, _: steps.append(step), options=EVERY)
    assert steps == []
    for ours, theirs in zip(again, first, strict=True):
        assert_same(ours, theirs)
        assert 0 < ours.seconds <= theirs.seconds
    assert stamps == [
        (r.adapter_dir / "adapter_model.safetensors").stat().st_mtime_ns  # type: ignore[operator]
        for r in again
    ]
    # what is left of a job that is done is a record without tensors
    left = safetensors.read(tmp_path / FOLDER / "a" / "state.safetensors")
    assert left == {}


def test_an_adapter_that_changed_is_trained_again(llm: LLM, tmp_path: Path) -> None:
    (first,) = finetune(llm, [job("a")], tmp_path, options=EVERY)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 3}))
    (again,) = finetune(llm, [job("a")], tmp_path, options=EVERY)
    assert_same(again, first)
    assert json.loads(config.read_text())["r"] == 8


def test_without_resume_it_starts_over(llm: LLM, tmp_path: Path) -> None:
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    (other,) = finetune(llm, [job("a", seed=5)], tmp_path, options=TrainOptions(checkpoint_every=2))
    (plain,) = finetune(llm, [job("a", seed=5)], tmp_path / "plain")
    assert_same(other, plain)
    assert not (tmp_path / "plain" / FOLDER).exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (job("a", learning_rate=0.5), r"job 'a' has learning_rate 0.003 \(now 0.5\); train"),
        (job("a", rank=2, seed=3), r"rank 8 \(now 2\), seed 0 \(now 3\), rows '\w+' \(now '\w+'\)"),
        (job("a", objective="ema"), r"objective 'Sft\(\)' \(now 'Ema\(strength=0.9\)'\)"),
        (
            FinetuneJob("a", rows(21, 0, safety=6), job("a").config),
            r"has rows '\w{16}' \(now '\w{16}'\)",
        ),
    ],
)
def test_a_changed_job_is_refused(
    llm: LLM, tmp_path: Path, changed: FinetuneJob, message: str
) -> None:
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    with pytest.raises(UsageError, match=message):
        finetune(llm, [changed], tmp_path, options=EVERY)


def test_another_base_is_refused(llm: LLM, tmp_path: Path) -> None:
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    llm.model.final_norm[0] += 1
    with pytest.raises(UsageError, match=r"has base '\w+' \(now '\w+'\)"):
        finetune(llm, [job("a")], tmp_path, options=EVERY)


def test_a_damaged_checkpoint_is_refused(llm: LLM, tmp_path: Path) -> None:
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    file = tmp_path / FOLDER / "a" / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        finetune(llm, [job("a")], tmp_path, options=EVERY)
    for metadata in (None, {"fastsafe.train/1": "{"}, {"fastsafe.train/1": "{}"}):
        safetensors.write(file, {}, metadata)
        with pytest.raises(CheckpointError, match="is no checkpoint of training, expected one"):
            finetune(llm, [job("a")], tmp_path, options=EVERY)


def test_leftovers_are_cleaned(llm: LLM, tmp_path: Path) -> None:
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    for folder in (tmp_path, tmp_path / FOLDER / "a"):
        (folder / ".tmp-left").mkdir()
    finetune(llm, [job("a")], tmp_path, options=EVERY)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_wrong_options() -> None:
    for options, message in (
        ({"max_jobs": 0}, "max_jobs is 0, expected an integer of at least 1 or 'auto'"),
        ({"max_jobs": None}, "max_jobs is None"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1, expected an integer of at least 0$"),
        ({"memory_bytes": 1.5}, "memory_bytes is 1.5, expected an integer of at least 1 or None"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainOptions(**options)  # type: ignore[arg-type]


def test_a_failed_job_is_tried_again(llm: LLM, tmp_path: Path) -> None:
    """It has no record of being done; its state is that of its last checkpoint."""
    bad = FinetuneJob("bad", rows(8), TrainConfig(max_steps=6, batch_size=8, learning_rate=1e-3))
    weight = llm.model.head
    kept = weight.clone()

    def spoil(step: int, losses: Any) -> None:
        if step == 3:
            weight.fill_(float("nan"))

    options = TrainOptions(checkpoint_every=2)
    (first,) = finetune(llm, [bad], tmp_path / "out", spoil, options=options)
    assert first.error is not None
    assert first.steps == 4
    weight.copy_(kept)
    (again,) = finetune(llm, [bad], tmp_path / "out", options=TrainOptions(resume=True))
    (plain,) = finetune(llm, [bad], tmp_path / "plain")
    assert_same(again, plain)
