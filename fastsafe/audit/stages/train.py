"""The train stages: fine-tune every missing adapter, then derive others from trained ones.

Killed at any moment, a stage that runs again reaches the same store: an adapter's folder is
published whole, and a wave is always trained together, so that a resumed run has the same bits as
an unbroken one.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.protocol import Job
from fastsafe.audit.plan.conditions import Condition, training_seed
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.store.sqlite_store import Store, now
from fastsafe.errors import StoreError, TrainingError
from fastsafe.io import atomic
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress, stage

ADAPTERS = "adapters"


def train(
    plan: Plan, store: Store, backend: EngineBackend, run_dir: Path, progress: Progress
) -> None:
    """Train every wave that has a missing or changed adapter.

    Raises:
        TrainingError: A job failed.
        StoreError: An adapter or the store cannot be written.
    """
    folder = run_dir / ADAPTERS
    folder.mkdir(exist_ok=True)
    atomic.remove_leftovers(folder)
    steps = plan.recipe.training.max_steps
    with stage(progress, "train", steps * len(plan.tuned), f"steps of {len(plan.tuned)} adapters"):
        for wave in plan.waves():
            if all(_is_trained(store, folder, condition) for condition in wave):
                progress.advance(steps * len(wave))
            else:
                _train_wave(plan, wave, store, backend, folder, progress)


def _train_wave(
    plan: Plan,
    wave: Sequence[Condition],
    store: Store,
    backend: EngineBackend,
    folder: Path,
    progress: Progress,
) -> None:
    began = time.monotonic()
    jobs = [
        Job(c.id, plan.training_rows[c.id], training_seed(plan.recipe, c.seed), c.objective)
        for c in wave
    ]
    steps_shown = 0

    def on_step(steps_done: int, loss: float) -> None:
        nonlocal steps_shown
        progress.advance((steps_done - steps_shown) * len(wave), f"loss {loss:.3f}")
        steps_shown = steps_done

    with TemporaryDirectory(prefix=atomic.PREFIX, dir=folder) as workspace:
        trained = backend.train(jobs, plan.recipe.training, Path(workspace), on_step, plan.watch)
        published = {}
        for condition in wave:
            adapter_dir = trained[condition.id].adapter_dir
            if adapter_dir is None:
                continue
            with atomic.publish_dir(folder / condition.id) as target:
                for file in sorted(adapter_dir.iterdir()):
                    file.rename(target / file.name)
            published[condition.id] = _published(folder / condition.id)
    progress.advance((plan.recipe.training.max_steps - steps_shown) * len(wave))
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
    for name, outcome in trained.items():
        if outcome.drift and outcome.drift[-1].stopped:
            steps = len(outcome.losses)
            progress.say(f"{name}: drifted too far and was stopped after {steps} steps")
    errors = [outcome.error for outcome in trained.values() if outcome.error is not None]
    if errors:
        raise TrainingError(errors[0])


def _published(folder: Path) -> str:
    sha256 = weights_sha256(folder)
    if sha256 is None:
        raise StoreError(f"adapter {folder}: holds no weights, expected a PEFT directory")
    return sha256


def _is_trained(store: Store, folder: Path, condition: Condition) -> bool:
    recorded = store.adapter(condition.id, condition.key)
    return recorded is not None and recorded == weights_sha256(folder / condition.id)


def derive(
    plan: Plan, store: Store, backend: EngineBackend, run_dir: Path, progress: Progress
) -> None:
    """Derive every missing adapter that a ``post`` mitigation makes of a trained one.

    Raises:
        AdapterError: The change does not fit the adapter.
    """
    folder = run_dir / ADAPTERS
    derived = [
        (condition, condition.variant)
        for condition in plan.conditions
        if condition.variant and condition.variant.stage == "post"
    ]
    with stage(progress, "derive", len(derived), "adapters"):
        for condition, variant in derived:
            if condition.parent and not _is_trained(store, folder, condition):
                backend.change(
                    variant.name,
                    variant.params,
                    folder / condition.parent,
                    folder / condition.id,
                )
                with store.transaction():
                    published = _published(folder / condition.id)
                    store.add_adapter(condition.id, condition.key, published, ())
            progress.advance(1)
