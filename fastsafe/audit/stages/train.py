"""The stages of a run. Each reads what is planned and not there, and adds it.

Killed at any moment, a stage that runs again reaches the same store: adapters appear whole, rows
are inserted once, and what is computed together is always computed together, so that not even the
rounding of a matrix product can tell a resumed run from an unbroken one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from fastsafe.audit.backend.protocol import Job, Reply, Request, Runtime
from fastsafe.audit.plan.conditions import BASE, Condition, training_seed
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.store.rows import CompletionRow
from fastsafe.audit.store.sqlite_store import Store, now
from fastsafe.errors import StoreError, TrainingError
from fastsafe.io import atomic
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress, stage

ADAPTERS = "adapters"
# Prompts that go to the engine together. On resume an unfinished chunk is asked again whole.
CHUNK_ROWS = 2048
COMMIT_EVERY_S = 1.0
COMMIT_ROWS = 256

T = TypeVar("T")


def train(plan: Plan, store: Store, runtime: Runtime, run_dir: Path, progress: Progress) -> None:
    """Train every wave that has a missing, changed or half-written adapter.

    Raises:
        TrainingError: A job cannot go on.
        StoreError: An adapter or the store cannot be written.
    """
    folder = run_dir / ADAPTERS
    folder.mkdir(exist_ok=True)
    atomic.remove_leftovers(folder)
    steps = plan.recipe.training.max_steps
    with stage(progress, "train", steps * len(plan.tuned), "adapter steps"):
        for wave in plan.waves():
            if all(_is_trained(store, folder, condition) for condition in wave):
                progress.advance(steps * len(wave))
            else:
                _train_wave(plan, wave, store, runtime, folder, progress)


def _train_wave(
    plan: Plan,
    wave: Sequence[Condition],
    store: Store,
    runtime: Runtime,
    folder: Path,
    progress: Progress,
) -> None:
    began = time.monotonic()
    jobs = [
        Job(c.id, plan.training_rows[c.id], training_seed(plan.recipe, c.seed), c.objective)
        for c in wave
    ]
    seen = 0

    def on_step(done: int, loss: float) -> None:
        nonlocal seen
        progress.advance((done - seen) * len(wave), f"loss {loss:.3f}")
        seen = done

    with TemporaryDirectory(prefix=atomic.PREFIX, dir=folder) as workspace:
        trained = runtime.train(jobs, plan.recipe.training, Path(workspace), on_step, plan.watch)
        published = {}
        for condition in wave:
            adapter_dir = trained[condition.id].adapter_dir
            if adapter_dir is None:
                continue
            with atomic.publish_dir(folder / condition.id) as target:
                for file in sorted(adapter_dir.iterdir()):
                    file.rename(target / file.name)
            published[condition.id] = _published(folder / condition.id)
    progress.advance((plan.recipe.training.max_steps - seen) * len(wave))
    with store.transaction():
        for condition in wave:
            if condition.id in published:
                store.add_adapter(
                    condition.id,
                    condition.key,
                    published[condition.id],
                    trained[condition.id].losses,
                    [other.id for other in plan.conditions if other.parent == condition.id],
                    trained[condition.id].drift,
                )
        detail = {
            "adapters": len(published),
            "steps": sum(len(trained[c.id].losses) for c in wave),
            "rows": sum(len(trained[c.id].losses) for c in wave) * plan.recipe.training.batch_size,
            "duration_s": time.monotonic() - began,
        }
        store.add_event(now(), "train", detail)
    for name, found in trained.items():
        if found.drift and found.drift[-1].stopped:
            progress.say(f"{name}: drifted too far and was stopped after {len(found.losses)} steps")
    errors = [found.error for found in trained.values() if found.error is not None]
    if errors:
        raise TrainingError(errors[0])


def _published(folder: Path) -> str:
    found = weights_sha256(folder)
    if found is None:
        raise StoreError(f"adapter {folder}: holds no weights, expected a PEFT directory")
    return found


def _is_trained(store: Store, folder: Path, condition: Condition) -> bool:
    recorded = store.adapter(condition.id, condition.key)
    return recorded is not None and recorded == weights_sha256(folder / condition.id)


def derive(plan: Plan, store: Store, runtime: Runtime, run_dir: Path, progress: Progress) -> None:
    """Make every missing adapter that another one is changed into; nothing is trained.

    Raises:
        AdapterError: The change does not fit the adapter.
    """
    folder = run_dir / ADAPTERS
    changed = [(c, c.treatment) for c in plan.conditions if c.treatment]
    changed = [(c, treatment) for c, treatment in changed if treatment.stage == "post"]
    with stage(progress, "derive", len(changed), "adapters"):
        for condition, treatment in changed:
            if condition.parent and not _is_trained(store, folder, condition):
                runtime.change(
                    treatment.name,
                    treatment.params,
                    folder / condition.parent,
                    folder / condition.id,
                )
                with store.transaction():
                    published = _published(folder / condition.id)
                    store.add_adapter(condition.id, condition.key, published, ())
            progress.advance(1)


def generate(plan: Plan, store: Store, runtime: Runtime, run_dir: Path, progress: Progress) -> None:
    """Ask every model every prompt that has no answer yet."""
    positions = store.positions()
    done = [is_done for _, _, is_done in positions]
    folder = run_dir / ADAPTERS
    adapter_of = {condition.id: condition.adapter for condition in plan.conditions}
    with stage(progress, "generate", len(positions), "answers"):
        progress.advance(sum(done))
        for adapters, begin, end in _chunks(plan, [c for _, c, _ in positions]):
            if all(done[begin:end]):
                continue
            rows = store.requests(positions[begin][0], positions[end - 1][0])
            missing = {key for (key, *_), old in zip(rows, done[begin:end], strict=True) if not old}
            writer = _AnswerWriter(store, progress, [key for key, *_ in rows], missing)
            began = time.monotonic()
            try:
                runtime.generate(
                    [
                        Request(adapter_of[condition], token_ids, seed, max_tokens)
                        for _, condition, token_ids, seed, max_tokens in rows
                    ],
                    {name: folder / name for name in adapters},
                    plan.recipe.sampling,
                    writer.add,
                )
            finally:
                writer.flush()
            with store.transaction():
                detail = {
                    "rows": len(rows),
                    "prompt_tokens": sum(len(row[2]) for row in rows),
                    "completion_tokens": writer.num_tokens,
                    "duration_s": time.monotonic() - began,
                }
                store.add_event(now(), "generate", detail)


def _chunks(plan: Plan, conditions: Sequence[str]) -> Iterator[tuple[set[str], int, int]]:
    """Yield (adapters to load, begin, end): a wave's rows, the base's with the first wave."""
    others = [condition for condition in plan.conditions if condition.id != BASE]
    wave_of = {c.id: n // plan.recipe.wave_size for n, c in enumerate(others)} | {BASE: 0}
    adapters: dict[int, set[str]] = {}
    for condition in others:
        if condition.adapter:
            adapters.setdefault(wave_of[condition.id], set()).add(condition.adapter)
    begin = 0
    for end in range(1, len(conditions) + 1):
        full = end - begin == CHUNK_ROWS
        wave = wave_of[conditions[begin]]
        if end == len(conditions) or full or wave_of[conditions[end]] != wave:
            yield adapters.get(wave, set()), begin, end
            begin = end


@dataclass
class _AnswerWriter:
    """Puts answers into the store as they come; what is counted as done is on disk."""

    store: Store
    progress: Progress
    keys: Sequence[str]
    missing: set[str]
    num_tokens: int = 0
    _buffer: list[CompletionRow] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, index: int, reply: Reply) -> None:
        """Take one reply, from any thread."""
        with self._lock:
            answer = CompletionRow(
                self.keys[index], reply.text, reply.token_ids, reply.finish_reason
            )
            self._buffer.append(answer)
            self.num_tokens += len(reply.token_ids)
            is_late = time.monotonic() - self._last >= COMMIT_EVERY_S
            if is_late or len(self._buffer) >= COMMIT_ROWS:
                self._write()

    def flush(self) -> None:
        """Write what is left."""
        with self._lock:
            if self._buffer:
                self._write()

    def _write(self) -> None:
        with self.store.transaction():
            self.store.add_completions(self._buffer)
        new = self.missing & {answer.key for answer in self._buffer}
        self.missing -= new
        self._buffer.clear()
        self._last = time.monotonic()
        self.progress.advance(len(new))
