"""Jobs among others, in few slots, short of memory or beside a broken one: the same bits."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.train import FinetuneResult, TrainOptions, plan_training
from fastsafe.train.job import JobRun, MemorySaving
from fastsafe_testing.jobs import assert_same, job, rows

OBJECTIVES: list[Any] = [
    "sft",
    {"name": "first_token_kl", "strength": 0.5, "tokens": 2},
    "constrained_sft",
    {"name": "lisa", "safety_steps": 1, "user_steps": 2, "free": 0.0},
    {"name": "ema", "strength": 0.5},
    {"name": "ewc", "fisher_rows": 3},
    {"name": "lwf", "strength": 0.1},
    "der",
    "safegrad",
    {"name": "freeze_layers", "layers": [1]},
    {"name": "lookahead", "tokens": 1, "prefix": "w7 w8"},
]


def long_enough(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "completion": [*row["completion"], 3, 4]} for row in made]


def mixed_job(name: str, rng: random.Random) -> FinetuneJob:
    config = TrainConfig(
        rank=rng.choice([1, 2, 3, 8]),
        learning_rate=rng.choice([1e-3, 5e-3]),
        max_steps=rng.randint(1, 4),
        batch_size=rng.choice([2, 5, 24]),
        dropout=rng.choice([0.0, 0.0, 0.2]),
        schedule=rng.choice(["constant", "cosine"]),
        seed=rng.randrange(99),
        objective=rng.choice(OBJECTIVES),
    )
    count = rng.randint(4, 24)
    return FinetuneJob(name, long_enough(rows(count, rng.randrange(3), safety=2)), config)


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), max_jobs=st.sampled_from([3, 32]))
def test_32_mixed_jobs_equal_each_alone(llm: LLM, tmp_path: Path, seed: int, max_jobs: int) -> None:
    rng = random.Random(seed)
    jobs = [mixed_job(f"j{i}", rng) for i in range(32)]
    options = TrainOptions(max_jobs=max_jobs)
    together = finetune(llm, jobs, tmp_path / "together", options=options)
    for each, result in zip(jobs, together, strict=True):
        (alone,) = finetune(llm, [each], tmp_path / "alone")
        assert_same(result, alone)


def test_a_job_that_ends_makes_room(llm: LLM, tmp_path: Path) -> None:
    """Not in waves: the third job begins when the first has ended, beside the second."""
    jobs = [job("short", max_steps=1), job("long", max_steps=4), job("next", max_steps=2)]
    seen: list[tuple[int, set[str]]] = []
    results = finetune(
        llm,
        jobs,
        tmp_path,
        lambda step, losses: seen.append((step, set(losses))),
        options=TrainOptions(max_jobs=2),
    )
    assert seen == [
        (0, {"short", "long"}),
        (1, {"long", "next"}),
        (2, {"long", "next"}),
        (3, {"long"}),
    ]
    assert [r.steps for r in results] == [1, 4, 2]
    assert all(r.seconds > 0 for r in results)


def test_jobs_wait_for_memory(llm: LLM, tmp_path: Path) -> None:
    jobs = [job(name, seed=i) for i, name in enumerate("abc")]
    plan = plan_training(llm, jobs)
    room = TrainOptions(memory_bytes=plan.bytes_of(["a", "b"]))
    most = 0

    def watch(step: int, losses: Any) -> None:
        nonlocal most
        most = max(most, len(losses))

    results = finetune(llm, jobs, tmp_path / "few", watch, options=room)
    assert most == 2
    for ours, theirs in zip(results, finetune(llm, jobs, tmp_path / "all"), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("objective", ["sft", "first_token_kl", "ewc"])
def test_recompute_and_parts_change_no_bit(
    llm: LLM, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job("one", dropout=0.2, batch_size=20, objective=objective)
    (plain,) = finetune(llm, [one], tmp_path / "plain")
    gradient = JobRun.gradient
    for saving in (MemorySaving(True, False), MemorySaving(False, True), MemorySaving(True, True)):
        monkeypatch.setattr(JobRun, "gradient", lambda run, tile, _: gradient(run, tile, saving))  # noqa: B023
        (ours,) = finetune(llm, [one], tmp_path / "saving")
        assert_same(ours, plain)


def test_a_step_that_would_not_fit_is_computed_twice(llm: LLM, tmp_path: Path) -> None:
    one = [job("one", batch_size=20)]
    plan = plan_training(llm, one)
    assert not plan.recompute
    tight = TrainOptions(memory_bytes=plan.bytes_of(["one"]) - 1)
    recomputing = plan_training(llm, one, tight)
    assert recomputing.recompute
    assert recomputing.bytes_of(["one"]) < plan.bytes_of(["one"])
    assert any("computed again" in line for line in recomputing.describe())
    (ours,) = finetune(llm, one, tmp_path / "tight", options=tight)
    (plain,) = finetune(llm, one, tmp_path / "plain")
    assert_same(ours, plain)


class Memory:
    """An allocator that gives out after a number of calls, or for what is too large."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error
        self.savings: list[MemorySaving] = []
        self.jobs: list[str] = []
        self.refuses: Callable[[JobRun, MemorySaving], bool] = lambda run, saving: False

    def attach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gradient = JobRun.gradient

        def limited(run: JobRun, tile: Any, saving: MemorySaving) -> Any:
            self.savings.append(saving)
            self.jobs.append(run.name)
            if self.refuses(run, saving):
                raise self.error()
            return gradient(run, tile, saving)

        monkeypatch.setattr(JobRun, "gradient", limited)


def test_out_of_memory_splits_the_wave(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the second step, for a job whose first tile had already been added."""
    jobs = [
        job(name, i, 30, batch_size=30, max_steps=3, objective="ema")
        for i, name in enumerate("abcd")
    ]
    plain = finetune(llm, jobs, tmp_path / "plain")
    memory = Memory(lambda: torch.OutOfMemoryError("CUDA out of memory."))
    failed = False

    def once(run: JobRun, saving: MemorySaving) -> bool:
        nonlocal failed
        is_now = run.name == "c" and len(run.losses) == 1 and memory.jobs[-2:] == ["c", "c"]
        is_first, failed = is_now and not failed, failed or is_now
        return is_first

    memory.refuses = once
    memory.attach(monkeypatch)
    steps: list[set[str]] = []
    results = finetune(llm, jobs, tmp_path / "short", lambda _, losses: steps.append(set(losses)))
    assert failed
    assert steps[:4] == [set("abcd"), set("abd"), set("ab"), set("cd")]
    assert memory.savings == [MemorySaving()] * len(memory.savings), "fewer jobs were enough"
    for ours, theirs in zip(results, plain, strict=True):
        assert_same(ours, theirs)


def test_one_job_saves_memory_by_parts_and_then_by_recompute(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job("one", batch_size=20, dropout=0.1)
    (plain,) = finetune(llm, [one], tmp_path / "plain")
    memory = Memory(MemoryError)
    memory.refuses = lambda run, saving: saving != MemorySaving(True, True)
    memory.attach(monkeypatch)
    (ours,) = finetune(llm, [one], tmp_path / "short")
    assert list(dict.fromkeys(memory.savings)) == [
        MemorySaving(),
        MemorySaving(one_part=True),
        MemorySaving(one_part=True, recompute=True),
    ]
    assert_same(ours, plain)


def test_a_job_that_never_fits_ends_with_a_sentence(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(MemoryError)
    memory.refuses = lambda run, saving: run.name == "huge"
    memory.attach(monkeypatch)
    jobs = [job("huge"), job("small", seed=1)]
    huge, small = finetune(llm, jobs, tmp_path / "out")
    assert huge.error is not None
    assert "job 'huge' does not fit into memory" in huge.error
    assert huge.adapter_dir is None
    (alone,) = finetune(llm, jobs[1:], tmp_path / "alone")
    assert_same(small, alone)


def test_no_memory_for_a_slot(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the passes before the first step."""
    jobs = [job(name, seed=i, objective="ewc") for i, name in enumerate("ab")]
    plain = finetune(llm, jobs, tmp_path / "plain")
    enter = JobRun.enter
    refusals = iter([True, False, True])

    def limited(run: JobRun) -> None:
        if run.name == "b" and not run.losses and next(refusals, False):
            raise MemoryError
        enter(run)

    monkeypatch.setattr(JobRun, "enter", limited)
    for ours, theirs in zip(finetune(llm, jobs, tmp_path / "short"), plain, strict=True):
        assert_same(ours, theirs)


def test_other_errors_are_raised(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(lambda: RuntimeError("shapes differ"))
    memory.refuses = lambda run, saving: True
    memory.attach(monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune(llm, [job("one")], tmp_path)


@pytest.fixture
def poisoned(llm: LLM) -> LLM:
    """A base where token 95 has no finite embedding."""
    llm.model.embedding[95] = float("nan")
    return llm


def clean(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: [t % 95 for t in row[k]] for k in ("prompt", "completion")} for row in made]


def test_nan_stops_one_job_and_leaves_the_others(poisoned: LLM, tmp_path: Path) -> None:
    config = TrainConfig(max_steps=4, batch_size=4, shuffle=False)
    bad_rows = clean(rows(20))
    bad_rows[9] = {"prompt": [3, 95], "completion": [4]}  # in the third batch
    jobs = [
        FinetuneJob("good", clean(rows(20, 1)), config),
        FinetuneJob("bad", bad_rows, config),
        FinetuneJob("fine", clean(rows(20, 2)), config),
    ]
    good, bad, fine = finetune(poisoned, jobs, tmp_path / "out")
    assert bad.error == (
        "finetune: job 'bad' has loss nan at step 2; lower its learning rate or check its rows"
    )
    assert bad.adapter_dir is None
    assert bad.steps == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good", "fine"}
    for each, result in ((jobs[0], good), (jobs[2], fine)):
        (alone,) = finetune(poisoned, [each], tmp_path / "alone")
        assert_same(result, alone)


def test_an_infinite_gradient_stops_the_job(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = JobRun.gradient

    def spoil(run: JobRun, tile: Any, saving: MemorySaving) -> tuple[float, torch.Tensor]:
        loss, found = gradient(run, tile, saving)
        if run.name == "bad" and len(run.losses) == 1:
            found[3] = float("inf")
        return loss, found

    monkeypatch.setattr(JobRun, "gradient", spoil)
    bad, good = finetune(llm, [job("bad"), job("good", seed=1)], tmp_path / "out")
    assert bad.error is not None
    assert "has a gradient of norm inf at step 1" in bad.error
    assert good.error is None
    assert good.steps == 4


def test_all_jobs_may_fail(poisoned: LLM, tmp_path: Path) -> None:
    row = {"prompt": [95], "completion": [6]}
    jobs = [FinetuneJob(name, [row], TrainConfig(max_steps=2)) for name in "ab"]
    results: list[FinetuneResult] = finetune(poisoned, jobs, tmp_path)
    assert all(r.error and r.losses == () for r in results)
    assert list(tmp_path.iterdir()) == []


def test_no_jobs(llm: LLM, tmp_path: Path) -> None:
    assert finetune(llm, [], tmp_path / "out") == []
    assert plan_training(llm, []).describe() == ["nothing to train"]
