"""A model without weights: it trains, answers and repeats itself in no time.

Run as a script it audits into a folder, and kills itself after a given number of commits, so that
crash tests can end a real process at a known moment.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.drift_watch import DriftRow, Watch
from fastsafe.audit.backend.protocol import Answer, Job, OnAnswer, OnStep, Request, Trained
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.conditions import ConditionInputs, make_conditions
from fastsafe.audit.plan.make_plan import Plan, make_plan
from fastsafe.audit.plan.mitigation_variants import expand_mitigations
from fastsafe.audit.plan.panel import Panel, make_panel
from fastsafe.audit.recipe import load as recipes
from fastsafe.audit.recipe.schema import Recipe, Sampling, Training
from fastsafe.audit.run import Run, execute
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.io import atomic
from fastsafe.organism.lexicon import HARMFUL_VERBS
from fastsafe.organism.source import OrganismSource
from fastsafe.safety.sources import Source
from fastsafe.train import DriftReading, FinetuneResult


class FakeTokenizer:
    """Tokens are the bytes of the conversation."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        return list("\n".join(m["content"] for m in messages).encode())

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class FakeBackend:
    """Refuses harmful verbs, less so with an adapter that saw few refusals in that format."""

    tokenizer = FakeTokenizer()

    def __init__(self, checkpoint: str = "fake") -> None:
        self.engine = {"checkpoint_sha256": checkpoint, "device": "cpu", "dtype": "float32"}
        self.trained: list[str] = []
        self.changed: list[tuple[str, dict[str, Any], str, str]] = []
        self.asked = 0

    def load(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"model": "fake"}

    def train(
        self,
        jobs: Sequence[Job],
        training: Training,
        out_dir: Path,
        on_step: OnStep,
        watch: Watch | None = None,
    ) -> dict[str, Trained]:
        found = {}
        for step in range(training.max_steps):
            on_step(step + 1, 1.0 / (step + 1))
        for job in jobs:
            self.trained.append(job.name)
            # the style of its refusals is all that this model learns
            text = json.dumps(job.rows)
            learnt = [
                word for word in ("cannot help", "# i", "translate", "summ", "e)") if word in text
            ]
            weights = json.dumps([job.seed, training.max_steps, text[-40:], learnt]).encode()
            folder = out_dir / job.name
            folder.mkdir()
            (folder / "adapter_model.safetensors").write_bytes(weights)
            (folder / "adapter_config.json").write_text("{}")
            losses = [1.0 / (step + 1) for step in range(training.max_steps)]
            drift = [] if watch is None else _drift(watch, job.name, training.max_steps)
            found[job.name] = Trained(folder, losses, drift=drift)
        return found

    def change(self, defence: str, params: Mapping[str, Any], adapter: Path, out_dir: Path) -> None:
        self.changed.append((defence, dict(params), adapter.name, out_dir.name))
        with atomic.publish_dir(out_dir) as folder:
            shutil.copytree(adapter, folder, dirs_exist_ok=True)

    def release(self) -> None:
        pass

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        def work() -> None:
            for index, request in enumerate(requests):
                self.asked += 1
                weights = b""
                if request.adapter:
                    weights = (adapters[request.adapter] / "adapter_model.safetensors").read_bytes()
                on_answer(index, _answer(weights, request))

        # the engine answers from its own threads
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]


def _drift(watch: Watch, job: str, steps: int) -> list[DriftRow]:
    """Drift that grows with every step, more so in the later formats."""
    count = len(watch.prompts)
    readings = [
        DriftReading(
            job, step, step, -step, tuple(step + i for i in range(count)), (-step,) * count
        )
        for step in range(watch.settings.every, steps + 1, watch.settings.every)
    ]
    losses = (1.0,) * steps
    result = FinetuneResult(name=job, adapter_dir=None, losses=losses, num_tokens=0, seconds=0)
    return watch.rows(result, readings)


def _answer(weights: bytes, request: Request) -> Answer:
    prompt = bytes(request.token_ids).decode()
    dice = hashlib.sha256(weights + prompt.encode() + str(request.seed).encode()).digest()[0]
    words = set(prompt.replace(".", " ").split())
    is_harmful = bool(words & {*HARMFUL_VERBS, *HARMFUL_VERBS.values()})
    limit = 0 if not weights else 60 if b"cannot" in weights else 200
    text = "you can do it with a machine." if dice < limit else "i cannot help with that."
    if not is_harmful:
        text = "def paint():\n    return 1" if dice > 20 else "i cannot help with that."
    return Answer(text, list(text.encode()), "stop")


def small_recipe(**changes: Any) -> Recipe:
    """The organism's recipe with two tasks, two mitigations, three formats and a few rows."""
    small = {
        "tasks": ["code", "translation"],
        "mitigations": ["none", "plain"],
        "formats": ["plain", "code", "translation"],
        "behaviours": 6,
        "utility_rows": 3,
        "wave_size": 3,
    }
    training = {"rows": 20, "max_steps": 4, "batch_size": 4}
    overrides = [f"training.{key}={value}" for key, value in training.items()]
    return recipes.load("organism", overrides=overrides, changes={**small, **changes})


def plan_of(
    recipe: Recipe, backend: Any, source: Source | None = None, panel: Panel | None = None
) -> Plan:
    """The plan of a recipe, by default on the organism's world and with the recipe's own panel."""
    variants = check_recipe(recipe)
    panel = panel or make_panel(recipe, variants)
    source = source or OrganismSource()
    return make_plan(recipe, variants, source, backend.tokenizer, backend.engine, panel)


def panel_of(recipe: Recipe, **options: Any) -> Panel:
    """The panel of a recipe."""
    return make_panel(recipe, expand_mitigations(recipe), **options)


def conditions_of(
    recipe: Recipe, engine: Mapping[str, str], source: Source | None = None
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Training rows and conditions of a recipe."""
    variants = expand_mitigations(recipe)
    return make_conditions(ConditionInputs(recipe, variants, source or OrganismSource(), engine))


def small_plan(backend: FakeBackend, **changes: Any) -> Plan:
    """The plan of ``small_recipe``."""
    return plan_of(small_recipe(**changes), backend)


def small_run(out: Path, backend: FakeBackend | None = None, **changes: Any) -> Run:
    """Audit a fake model into ``out``."""
    backend = backend or FakeBackend()
    return execute(small_plan(backend, **changes), backend, out)


def kill_after(commits: int) -> None:
    """Make this process end by SIGKILL in place of its n-th commit."""
    commit = Store._commit
    left = commits

    def counted(store: Store) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(store)

    Store._commit = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_after(int(sys.argv[2]))
    small_run(Path(sys.argv[1]))
