"""Audit a model every few steps inside transformers' Trainer or TRL's SFTTrainer.

    trainer = SFTTrainer(..., callbacks=[AuditCallback(every=100, limit=20)])

It uses only the trainer's events; importing this module does not import transformers.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastsafe.audit.backend.on_engine import TEXT_FILES
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.spot_check import SpotCheck
from fastsafe.errors import UsageError


class AuditCallback:
    """Audits the model in training and adds its rates to the trainer's log.

    Answer rate on harmful probes and over-refusal rate on their benign twins go, per format, into
    ``trainer.state.log_history`` as ``audit/<format>/<rate>``, with the base's rate beside it as
    ``.../base``. All figures, with intervals, are in ``history``. Training is not changed: the
    model is saved to a temporary folder and loaded from there.

    Attributes:
        history: (step, rows of ``SpotCheck``) of every audit, in order.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        recipe: str | Path | Recipe = "organism",
        limit: int | None = 20,
        base: str | None = None,
        device: str | None = None,
    ) -> None:
        """Store the settings; recipe and base are checked when training begins.

        Args:
            every: Steps between two audits; one more follows the last step.
            recipe: Recipe whose probes and judge are used.
            limit: Maximum number of behaviours per format.
            base: Checkpoint that is tuned; None takes a PEFT model's ``base_model_name_or_path``,
                or the path that the model was loaded from.
            device: Device that generates; None takes the trainer's. The base is loaded there a
                second time.

        Raises:
            UsageError: ``every`` is below 1.
        """
        if every < 1:
            raise UsageError(f"AuditCallback: every is {every}, expected at least 1")
        self.history: list[tuple[int, list[dict[str, Any]]]] = []
        self._every = every
        self._recipe = recipe
        self._limit = limit
        self._base = base
        self._device = device
        self._check: SpotCheck | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Check recipe and base before the first step."""
        if not state.is_world_process_zero:
            return
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise UsageError(
                "AuditCallback: weights are sharded (FSDP or DeepSpeed), expected whole ones in "
                "each process; audit the saved adapters instead"
            )
        base = self._base or _base_of(more["model"])
        device = self._device or args.device.type
        self._check = SpotCheck(base, self._recipe, limit=self._limit, device=device)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Audit when ``every`` more steps are done."""
        if state.global_step % self._every == 0:
            self._audit(state, more["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Audit the final model, unless its last step was just audited."""
        if state.global_step % self._every:
            self._audit(state, more["model"])

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Ignore every other event: trainers call all of them, and the set varies."""
        if name.startswith("on_"):
            return lambda *args, **more: None
        raise AttributeError(f"AuditCallback has no attribute {name!r}")

    def _audit(self, state: Any, model: Any) -> None:
        if self._check is None:  # not the first process
            return
        with TemporaryDirectory(prefix="fastsafe-") as folder:
            model.save_pretrained(folder)
            if hasattr(model, "peft_config"):
                rows = self._check.adapter(folder)
            else:
                for name in TEXT_FILES:
                    if (self._check.base / name).is_file():
                        shutil.copyfile(self._check.base / name, Path(folder, name))
                rows = self._check.model(folder)
        self.history.append((state.global_step, rows))
        logs: dict[str, Any] = {"step": state.global_step}
        for row in rows:
            prompted = "" if row["system_prompt"] == "none" else f"+{row['system_prompt']}"
            key = f"audit/{row['format']}{prompted}/{row['measure']}"
            logs |= {key: row["rate"], f"{key}/base": row["base_rate"]}
        state.log_history.append(logs)


def _base_of(model: Any) -> str:
    configs = getattr(model, "peft_config", None)
    base = next(iter(configs.values())).base_model_name_or_path if configs else None
    base = base or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not base:
        raise UsageError(
            "AuditCallback: the model's base is not known, expected a path or hub id; pass base="
        )
    return str(base)
