"""An audit in which one adapter cannot be trained: the others are kept, and it says why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.backend.protocol import Job, OnStep, Trained
from fastsafe.errors import TrainingError
from fastsafe_testing import fake_model as fake


def test_the_others_are_saved_before_the_error(tmp_path: Path) -> None:
    class Unlucky(fake.FakeBackend):  # type: ignore[misc, name-defined]
        fails = True

        def train(
            self,
            jobs: Sequence[Job],
            training: Any,
            out_dir: Path,
            on_step: OnStep,
            watch: Any = None,
        ) -> dict[str, Trained]:
            found = super().train(jobs, training, out_dir, on_step, watch)
            if self.fails:
                name = jobs[0].name
                found[name] = Trained(None, [1.0], f"finetune: job {name!r} has loss nan at step 1")
            return found

    runtime = Unlucky()
    with pytest.raises(TrainingError, match="has loss nan at step 1"):
        fake.small_run(tmp_path / "run", runtime)
    first, *others = runtime.trained
    saved = {p.name for p in (tmp_path / "run" / "adapters").iterdir()}
    assert saved == set(others)
    assert others, "the wave has more than one job"
    runtime.fails = False
    run = fake.small_run(tmp_path / "run", runtime)
    assert run.results["conditions"]
    assert (tmp_path / "run" / "adapters" / first).is_dir()
