"""The training loop: any number of adapters on one frozen base, a step of each in turn.

Every job's batch is split into tiles of whole sequences, packed without padding. A tile runs in one
thread; tiles of all jobs fill the cores. A job's gradient is the sum over its own tiles in their
order, so training it among others gives the same bits as training it alone. A job holds a slot,
which is memory, from its first step to its last; then the next job in the queue gets it.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fastsafe.data.packing import TrainExample
from fastsafe.errors import UsageError
from fastsafe.io import atomic
from fastsafe.io.lock import exclusive
from fastsafe.model.cpu_threads import TileRunner, is_out_of_memory, tile_runner
from fastsafe.train.batches import Tile
from fastsafe.train.checkpoint import JobCheckpoint, base_digest, job_identity
from fastsafe.train.config import FinetuneJob, FinetuneResult, TrainOptions, check_jobs
from fastsafe.train.drift_monitor import DriftProbe
from fastsafe.train.job import FrozenBase, JobRun, MemorySaving
from fastsafe.train.memory import TrainMemory, plan_memory

OnStep = Callable[[int, Mapping[str, float]], None]

LOCK = ".lock"  # in the folder of adapters; no job can have this name
_DEFAULTS = TrainOptions()
_LOGGER = logging.getLogger(__name__)


def finetune(
    llm: FrozenBase,
    jobs: Sequence[FinetuneJob],
    out_dir: str | Path,
    on_step: OnStep | None = None,
    *,
    options: TrainOptions = _DEFAULTS,
) -> list[FinetuneResult]:
    """Train one LoRA adapter per job, all on the same frozen base.

    A job whose loss or gradient is not finite ends with ``FinetuneResult.error``; the others go on
    as if it had not been there. Short of memory, fewer jobs run at once, then parts of tiles one
    after another, then activations are computed twice; a job that still does not fit ends with an
    error. On a CPU none of this changes a bit. Finished jobs and the plan of memory are logged to
    ``fastsafe.train`` at the level INFO.

    Args:
        llm: The base: an ``LLM``, or anything with its path, model and tokenizer.
        jobs: What to train; names are unique and name directories.
        out_dir: Each adapter is written to ``out_dir/<job name>`` in PEFT's layout as soon as it
            is trained.
        on_step: Called after every step of the loop with its index and the loss of each job that
            took a step in it. Jobs may be at different steps of their own.
        options: How many jobs at once, checkpoints, and a drift monitor.

    Returns:
        One result per job, in order.

    Raises:
        UsageError: Names clash or cannot be directory names, an objective lacks rows, or a
            checkpoint to resume from is of another config, other rows or another base.
        DataError: A row is malformed or has nothing to train on.
        AdapterError: ``target_modules`` name a module that the base lacks.
        CheckpointError: A checkpoint to resume from is damaged.
        StoreError: Another training writes to ``out_dir``, or it cannot be written.
    """
    check_jobs(jobs)
    if isinstance(llm, str | Path):
        raise UsageError(f"finetune: llm is {str(llm)!r}, expected an LLM; pass LLM({str(llm)!r})")
    runs = prepare(llm, jobs)
    out = Path(out_dir)
    if options.checkpoint_every or options.resume:
        base = base_digest(llm.model)
        for run in runs:
            run.checkpoint = JobCheckpoint(out, run.name, job_identity(run.config, run.rows, base))
    plan = plan_memory(llm.model, runs, options)
    for line in plan.describe():
        _LOGGER.info("memory: %s", line)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out, label="folder", name=LOCK):
        if options.resume:
            atomic.remove_leftovers(out)
            for run in runs:
                run.resume()
        with tile_runner(llm.model.device) as runner:
            waiting = deque(run for run in runs if run.adapter_dir is None)
            _Loop(llm, waiting, out, on_step, options, plan, runner).run()
    return [run.result() for run in runs]


def prepare(llm: FrozenBase, jobs: Sequence[FinetuneJob]) -> list[JobRun]:
    """Encode the rows of all jobs and check them before training."""
    encoded: dict[str, TrainExample] = {}
    return [JobRun(llm, job, encoded) for job in jobs]


def plan_training(
    llm: FrozenBase, jobs: Sequence[FinetuneJob], options: TrainOptions = _DEFAULTS
) -> TrainMemory:
    """Predict the memory of a ``finetune`` with these arguments; nothing is trained or written.

    Raises:
        UsageError: As ``finetune``, as do the next two.
        DataError: A row is malformed.
        AdapterError: A target is unknown.
    """
    return plan_memory(llm.model, prepare(llm, jobs), options)


@dataclass
class _Loop:
    llm: FrozenBase
    waiting: deque[JobRun]
    out_dir: Path
    on_step: OnStep | None
    options: TrainOptions
    plan: TrainMemory
    runner: TileRunner

    def __post_init__(self) -> None:
        self.running: list[JobRun] = []
        self.limit = self.plan.max_jobs
        self.saving = MemorySaving(recompute=self.plan.recompute)
        self.probe: DriftProbe | None = None
        if self.options.monitor and self.waiting:
            self.probe = DriftProbe(self.options.monitor, self.llm.model, self.llm.tokenizer)

    def run(self) -> None:
        """Step until no job is left."""
        step = 0
        while self.running or self.waiting:
            if not self._fill():
                self._save_memory()
                continue
            losses, fits = self._step()
            if losses and self.on_step:
                self.on_step(step, losses)
            step += bool(losses)
            self._retire()
            if not fits:
                self._save_memory()

    def _fill(self) -> bool:
        """Admit waiting jobs while they fit; return whether memory sufficed."""
        while self.waiting and len(self.running) < self.limit:
            candidates = [*self.running, self.waiting[0]]
            if self.running and not self.plan.fits([run.name for run in candidates]):
                break
            self.running.append(self.waiting.popleft())
        try:
            for run in self.running:
                run.enter()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _step(self) -> tuple[dict[str, float], bool]:
        """Take one step of every running job.

        Returns:
            The loss of each job that took it, and whether memory sufficed for all.
        """
        work = [(run, tile) for run in self.running for tile in run.tiles()]
        results = zip(work, self.runner.map(self._gradient, work), strict=True)
        losses: dict[str, float] = {}
        fits = True
        for run, items in groupby(results, lambda item: item[0][0]):
            is_complete = True
            for (_, tile), result in items:
                if result is None:
                    is_complete = False
                else:
                    loss, gradient = result
                    run.add(tile, loss, gradient)
            if not is_complete:
                fits = False
                run.drop_step()
                continue
            run.update(self.probe)
            if run.error is None:
                losses[run.name] = run.losses[-1]
        return losses, fits

    def _gradient(self, work: tuple[JobRun, Tile]) -> tuple[float, Tensor] | None:
        """Return the loss and gradient of a tile; None where memory did not suffice."""
        run, tile = work
        try:
            return run.gradient(tile, self.saving)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _retire(self) -> None:
        """Write due checkpoints and the adapters of finished jobs, and drop these jobs."""
        for run in self.running:
            if run.error is None and run.is_done:
                run.finish(self.out_dir)
                ends = f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}" if run.losses else ""
                _LOGGER.info("trained %s in %d steps, %s", run.name, len(run.losses), ends)
            else:
                run.save(self.options.checkpoint_every)
        self.running = [run for run in self.running if not run.is_done]

    def _save_memory(self) -> None:
        """Reduce memory use by the cheapest step left.

        Fewer jobs, then smaller parts of tiles, then recomputation; finally fail one job.
        """
        if len(self.running) > 1:
            self.limit = len(self.running) // 2
            for run in reversed(self.running[self.limit :]):
                run.park()
                self.waiting.appendleft(run)
            del self.running[self.limit :]
        elif not self.saving.one_part:
            self.saving = self.saving._replace(one_part=True)
        elif not self.saving.recompute:
            self.saving = self.saving._replace(recompute=True)
        else:
            for run in self.running:
                run.stop(
                    f"job {run.name!r} does not fit into memory by itself; lower its rank or its "
                    "longest rows, or use a larger device"
                )
            self.running.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
