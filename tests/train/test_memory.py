"""The memory plan against what training allocates, and bf16 on a CPU.

Allocations are counted from below autograd: a dispatch mode sees every tensor that an operation
makes and adds up the storages that are still alive.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune, organism
from fastsafe.model import Transformer
from fastsafe.organism.source import SOURCE
from fastsafe.train import TrainOptions, plan_training
from fastsafe.train.job import JobRun, MemorySaving
from fastsafe.train.loop import prepare
from fastsafe_testing.jobs import job, rows, weights


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations have made and that live."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            # a view of the base's weights is not an allocation
            if storage.data_ptr() not in given:
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        live = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self._storages = live
        return sum(nbytes for _, nbytes in live.values())


@pytest.fixture(scope="module")
def tuned() -> LLM:
    return LLM(organism.path())


CASES: list[dict[str, Any]] = [
    {},
    {"loss_on": "all"},
    {"rank": 32},
    {"dropout": 0.1},
    {"target_modules": ["q_proj", "v_proj"]},
    {"objective": {"name": "ema"}},
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_plan_is_within_ten_percent(tuned: LLM, options: dict[str, Any], recompute: bool) -> None:
    """Per adapter, and per token of a tile."""
    data = SOURCE.task_rows("code", 60, "train", 0)
    one = FinetuneJob("a", data, TrainConfig(batch_size=10, max_steps=3, **options))
    (planned,) = plan_training(tuned, [one]).jobs
    (run,) = prepare(tuned, [one])
    with Allocations() as allocations:
        run.enter()
        (tile, *_) = run.tiles()
        slot = allocations.now()
        allocations.peak = 0
        _, gradient = run.gradient(tile, MemorySaving(recompute=recompute))
        used = allocations.peak - slot - gradient.nbytes
    assert planned.gradient_bytes == gradient.nbytes
    assert planned.adapter_bytes == pytest.approx(slot + gradient.nbytes, rel=0.1)
    num_tokens = sum(len(e.token_ids) - 1 for part in tile.parts for e in part)
    expected = planned.recompute_token_bytes if recompute else planned.token_bytes
    assert expected == pytest.approx(used / num_tokens, rel=0.1)


def test_a_deep_model_needs_little_with_recompute() -> None:
    """What is kept of a layer is what enters it."""
    base = LLM(organism.path())
    n = 12
    deep = replace(base.model.config, num_layers=n, windows=(None,) * n, rope_of_layer=(0,) * n)
    base.model = Transformer.random(deep)
    data = SOURCE.task_rows("code", 60, "train", 0)
    one = FinetuneJob("a", data, TrainConfig(batch_size=10, max_steps=3))
    (planned,) = plan_training(base, [one]).jobs
    (run,) = prepare(base, [one])
    run.enter()
    (tile, *_) = run.tiles()
    num_tokens = sum(len(e.token_ids) - 1 for part in tile.parts for e in part)
    peaks = []
    for recompute in (False, True):
        with Allocations() as allocations:
            _, gradient = run.gradient(tile, MemorySaving(recompute=recompute))
            peaks.append((allocations.peak - gradient.nbytes) / num_tokens)
    assert planned.token_bytes == pytest.approx(peaks[0], rel=0.1)
    assert planned.recompute_token_bytes == pytest.approx(peaks[1], rel=0.1)
    assert peaks[1] < 0.3 * peaks[0]


def test_plan_says_what_it_means(llm: LLM) -> None:
    jobs = [job("a"), job("b", rank=6), job("c", rank=8)]
    plan = plan_training(llm, jobs)
    assert plan.first_wave == 3
    first, second, third = plan.describe()
    assert first.startswith("3 jobs, 3 at once: ")
    assert "per adapter of rank 8" in second
    assert "per token of a tile of" in second
    assert third.startswith("rank 6: vLLM takes 8, 16, 32")
    one, two = plan.bytes_of(["a"]), plan.bytes_of(["a", "c"])
    (a, _, c) = plan.jobs
    assert two - one == a.adapter_bytes == c.adapter_bytes
    assert plan.free_bytes > 1 << 20
    assert plan_training(llm, jobs, TrainOptions(max_jobs=2)).first_wave == 2
    assert plan_training(llm, jobs, TrainOptions(memory_bytes=1)).first_wave == 1


def test_objectives_with_a_state_take_more(llm: LLM) -> None:
    plain, average, both = (
        plan_training(llm, [job("a", objective=name)]).jobs[0]
        for name in ("sft", "ema", "safegrad")
    )
    assert average.adapter_bytes == both.adapter_bytes
    assert average.adapter_bytes - plain.adapter_bytes == plain.gradient_bytes


@pytest.mark.parametrize("objective", ["sft", "first_token_kl", "der"])
def test_bf16_on_a_cpu_keeps_fp32_adapters(
    checkpoint: Path, tmp_path: Path, objective: str
) -> None:
    one = FinetuneJob(
        "a",
        rows(24, 1, safety=6),
        TrainConfig(max_steps=4, batch_size=6, learning_rate=2e-3, objective=objective),
    )
    exact, coarse = (
        finetune(LLM(checkpoint, dtype=dtype), [one], tmp_path / dtype)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert coarse.losses == pytest.approx(exact.losses, rel=0.05)
    assert coarse.losses != exact.losses
    for name, weight in weights(coarse.adapter_dir).items():
        assert weight.dtype is torch.float32, name
        # an update below bf16's resolution of the weight must not be lost
        changed = weight != weight.bfloat16().float()
        assert changed.float().mean() > 0.5, name


def test_nothing_of_a_job_stays_when_it_is_done(llm: LLM, tmp_path: Path) -> None:
    """The slot's tensors are gone before the next job enters."""
    held: list[bool] = []
    enter = JobRun.enter
    runs: list[JobRun] = []

    def watched(run: JobRun) -> None:
        if run not in runs:
            held.extend(other._slot is not None for other in runs)
            runs.append(run)
        enter(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRun, "enter", watched)
        options = TrainOptions(max_jobs=1)
        finetune(llm, [job("a"), job("b", seed=1), job("c")], tmp_path, options=options)
    assert held == [False] * 3
