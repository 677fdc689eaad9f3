"""The panel of a run: its judges, guards and writer, built from what the recipe says of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsafe.audit.plan.mitigation_variants import treatments
from fastsafe.audit.plan.rewriting import make_writer
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.errors import RecipeError, UsageError
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.guards import Guard, make_guard
from fastsafe.safety.judges import Judge, make_judge, make_rewordings, rows_to_calibrate
from fastsafe.safety.mixing.rewriter import Rewriter


@dataclass(frozen=True)
class Panel:
    """Who reads the answers, and who words training rows.

    Attributes:
        judges: By id; the first one's verdicts make the summary.
        guards: That are audited, by id.
        filters: Guards that stand behind a model, by the label of the treatment.
        wordings: By judge, its wordings and the judge in each, its own one too; they read harmful
            probes alone.
        calibrated: By judge, how many labelled rows it reads at most, None for all.
        writer: Words rows; None leaves them to templates.
    """

    judges: Mapping[str, Judge]
    guards: Mapping[str, Guard] = field(default_factory=dict)
    filters: Mapping[str, Guard] = field(default_factory=dict)
    wordings: Mapping[str, Mapping[str, Judge]] = field(default_factory=dict)
    calibrated: Mapping[str, int | None] = field(default_factory=dict)
    writer: Rewriter | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Judge id -> hash of everything that can change its verdicts."""
        return {name: judge.identity for name, judge in self.judges.items()}

    @property
    def harmful_only(self) -> list[str]:
        """Judges whose score says nothing of benign prompts: they do not read twins."""
        return [n for n, judge in self.judges.items() if getattr(judge, "harmful_only", False)]

    @property
    def wording_identities(self) -> dict[str, dict[str, str]]:
        """Judge id -> wording -> hash of everything that can change its verdicts."""
        return {
            name: {wording: judge.identity for wording, judge in reworded.items()}
            for name, reworded in self.wordings.items()
        }

    @property
    def guard_identities(self) -> dict[str, str]:
        """Guard id -> hash of everything that can change what it says."""
        return {name: guard.identity for name, guard in self.guards.items()}


def make_panel(
    recipe: Recipe,
    *,
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Panel:
    """Build what a recipe names; no model is loaded and nobody is called.

    Args:
        recipe: Its ``judges`` and ``guards`` are names, or mappings as ``make_judge`` takes them.
        device: Where judges that are checkpoints run.
        api_keys: Keys of endpoints by the name of their environment variable.
        folder: Where replies and spending of endpoints are kept between runs.

    Raises:
        RecipeError: A setting is wrong, or two have one id.
        CheckpointError: A checkpoint is missing, malformed or refused.
    """
    opened: dict[tuple[str, ...], Completer] = {}

    def open_checkpoint(path: str, dtype: str = "float32", backend: str = "fastsafe") -> Completer:
        from fastsafe.audit.backend.completer import CheckpointCompleter

        # two judges on one checkpoint share its weights
        key = path, dtype, backend
        if key not in opened:
            opened[key] = CheckpointCompleter(path, device=device, dtype=dtype, backend=backend)
        return opened[key]

    options: dict[str, Any] = {
        "open_checkpoint": open_checkpoint,
        "api_keys": api_keys,
        "folder": folder,
    }
    try:
        made = [make_judge(spec, **options) for spec in recipe.judges]
        reworded = [make_rewordings(spec, **options) for spec in recipe.judges]
        return Panel(
            _by_id("judges", made),
            _by_id("guards", [make_guard(spec, **options) for spec in recipe.guards]),
            {
                treatment.label: make_guard(treatment.params["guard"], **options)
                for treatment in treatments(recipe)
                if treatment.filters
            },
            {judge.id: found for judge, found in zip(made, reworded, strict=True) if found},
            {
                judge.id: rows_to_calibrate(spec)
                for judge, spec in zip(made, recipe.judges, strict=True)
            },
            make_writer(recipe.rewrite, device=device, api_keys=api_keys, folder=folder)
            if recipe.rewrite
            else None,
        )
    except UsageError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from error


def _by_id(what: str, parts: list[Any]) -> dict[str, Any]:
    found = {part.id: part for part in parts}
    if len(found) < len(parts):
        names = ", ".join(part.id for part in parts)
        raise UsageError(f"{what} are {names}, expected each id once; give one another id")
    return found
