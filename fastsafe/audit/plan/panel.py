"""Build the models that a recipe names beside the audited one: judges, guards, the rewriter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.completer import CheckpointCompleter
from fastsafe.audit.plan.mitigation_variants import MitigationVariant
from fastsafe.audit.recipe.schema import Recipe, RewriterSettings
from fastsafe.errors import RecipeError, UsageError
from fastsafe.safety.completers.http import open_endpoint
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.guards import Guard, make_guard
from fastsafe.safety.judges import Judge, make_judge, make_rewordings, rows_to_calibrate
from fastsafe.safety.mixing.rewriter import Rewriter


@dataclass(frozen=True)
class Panel:
    """The judges, guards and rewriter of a run.

    Attributes:
        judges: Judges by id; the first one's verdicts make the summary.
        guards: Audited guards by id.
        filters: Guards that filter a model's answers, by the label of the mitigation variant.
        wordings: Judge id -> wording of its rubric -> the judge with it, the default wording
            included; these judges read harmful probes only.
        calibrated: Judge id -> the most labelled rows that it reads, None for all.
        rewriter: Model that rewords training rows; None leaves them to templates.
    """

    judges: Mapping[str, Judge]
    guards: Mapping[str, Guard] = field(default_factory=dict)
    filters: Mapping[str, Guard] = field(default_factory=dict)
    wordings: Mapping[str, Mapping[str, Judge]] = field(default_factory=dict)
    calibrated: Mapping[str, int | None] = field(default_factory=dict)
    rewriter: Rewriter | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Judge id -> hash of everything that can change its verdicts."""
        return {name: judge.identity for name, judge in self.judges.items()}

    @property
    def harmful_only(self) -> list[str]:
        """Ids of judges whose score means nothing on benign prompts: they do not read twins."""
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
        """Guard id -> hash of everything that can change its verdicts."""
        return {name: guard.identity for name, guard in self.guards.items()}


def make_panel(
    recipe: Recipe,
    variants: Sequence[MitigationVariant],
    *,
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Panel:
    """Build the panel of a recipe; no weights are loaded and no endpoint is called.

    Args:
        recipe: Its ``judges`` and ``guards`` are names, or mappings as ``make_judge`` takes them.
        variants: Its mitigations, expanded; some filter answers through a guard.
        device: Device of judges that are checkpoints.
        api_keys: Keys of endpoints by the name of their environment variable.
        folder: Folder that keeps replies and spending of endpoints between runs.

    Raises:
        RecipeError: A setting is wrong, or two have one id.
        CheckpointError: A checkpoint is missing, malformed or refused.
    """
    opened: dict[tuple[str, ...], Completer] = {}

    def open_checkpoint(path: str, dtype: str = "float32", backend: str = "fastsafe") -> Completer:
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
                variant.label: make_guard(variant.params["guard"], **options)
                for variant in variants
                if variant.served_on == "answer"
            },
            {
                judge.id: wordings
                for judge, wordings in zip(made, reworded, strict=True)
                if wordings
            },
            {
                judge.id: rows_to_calibrate(spec)
                for judge, spec in zip(made, recipe.judges, strict=True)
            },
            make_rewriter(recipe.rewrite, device=device, api_keys=api_keys, folder=folder)
            if recipe.rewrite
            else None,
        )
    except UsageError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from error


def make_rewriter(
    settings: RewriterSettings,
    *,
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Rewriter:
    """Build the rewriter that a recipe names; no weights are loaded and no endpoint is called.

    Args:
        settings: A checkpoint or an endpoint.
        device: Device of a checkpoint.
        api_keys: Keys of endpoints by the name of their environment variable.
        folder: Folder that keeps replies and spending between runs.

    Raises:
        UsageError: A setting of the endpoint is wrong.
        CheckpointError: The checkpoint is missing, malformed or refused.
    """

    def open_completer() -> Completer:
        if settings.checkpoint is None:
            return open_endpoint(settings.endpoint, "rewrite", api_keys, folder)
        variables = settings.chat_template_kwargs
        return CheckpointCompleter(
            settings.checkpoint, device=device, chat_template_kwargs=variables
        )

    open_completer()  # raises now for what cannot be opened later
    return Rewriter(open_completer, max_tokens=settings.max_tokens, folder=folder)


def _by_id(section: str, parts: list[Any]) -> dict[str, Any]:
    by_id = {part.id: part for part in parts}
    if len(by_id) < len(parts):
        names = ", ".join(part.id for part in parts)
        raise UsageError(f"{section} are {names}, expected each id once; give one another id")
    return by_id
