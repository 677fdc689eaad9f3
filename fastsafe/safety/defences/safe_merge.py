"""SafeMERGE: blend the updates that left the safety subspace with those of a safe adapter.

dW <- a dW_tuned + (1 - a) dW_safe in the modules with cos(C dW, dW) < t, with C as in SafeLoRA. The
sum is exact: the two adapters' factors are concatenated, so that their ranks may differ. The result
has the sum of both ranks in all modules (padded with zeros where nothing was blended), which every
PEFT reader accepts.

Source: Djuhera et al. 2025, arXiv:2503.17239 (verified: the subspace, a = 0.8, t = 0.35).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.errors import UsageError

from ._spec import Defence
from ._weights import notes

if TYPE_CHECKING:
    from fastsafe.model.lora import Adapter
    from fastsafe.model.weights import TensorSource


def safe_merge(
    adapter: "Adapter",
    safe: "Adapter",
    aligned: "TensorSource",
    unaligned: "TensorSource",
    *,
    keep: float,
    threshold: float,
) -> tuple["Adapter", dict[str, Any]]:
    """Return the adapter with its chosen modules blended, and the record of the edit.

    Args:
        adapter: On ``aligned``.
        safe: Adapter tuned on safety data alone, with at least the modules of ``adapter``.
        aligned: Checkpoint both were trained on, theta_0.
        unaligned: The same model before alignment, theta_b.
        keep: Share a of the tuned update, in [0, 1]; 1 changes nothing.
        threshold: Cosine below which a module is blended, in [-1, 1].

    Raises:
        UsageError: An argument is out of range.
        AdapterError: ``safe`` lacks a module.
        CheckpointError: ``unaligned`` has other shapes, or is the same model.
    """
    from fastsafe.model.weight_edits import add, check_modules, project_all, uniform

    if not (0 <= keep <= 1 and -1 <= threshold <= 1):
        raise UsageError(
            f"safe_merge: keep is {keep} and threshold {threshold}, expected a number in [0, 1] "
            "and one in [-1, 1]"
        )
    check_modules(adapter, safe)
    cosines = project_all(adapter, aligned, unaligned).cosines
    chosen = [module for module, similar in cosines.items() if similar < threshold and keep < 1]
    record = {"cosine": cosines, "changed": sorted(chosen)}
    if not chosen:
        return adapter, record
    blended = {m: add(adapter.weights[m], safe.weights[m], keep, 1 - keep) for m in chosen}
    return uniform(adapter, {**adapter.weights, **blended}), record


def _apply(
    tuned: Path,
    base: Path,
    out: Path,
    *,
    unaligned: str | Path,
    safe_adapter: str | Path,
    **params: Any,
) -> None:
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model.weight_edits import read_adapter

    aligned = Checkpoint(base)
    adapter, safe = read_adapter(tuned, aligned), read_adapter(Path(safe_adapter), aligned)
    edited, record = safe_merge(adapter, safe, aligned, Checkpoint(unaligned), **params)
    given = {"unaligned": unaligned, "safe_adapter": safe_adapter, **params}
    edited.save(out, notes(DEFENCE, given, record))


DEFENCE = Defence(
    id="safe_merge",
    stage="post",
    acts_on="weights",
    about="blends the updates least like alignment with those of a safe adapter",
    evidence="verified; Djuhera et al. 2025, arXiv:2503.17239",
    needs={
        "unaligned": "the checkpoint before alignment, of the same shapes",
        "safe_adapter": "an adapter tuned on safety data alone, on the same base",
    },
    params={"keep": 0.8, "threshold": 0.35},
    apply=_apply,
)
