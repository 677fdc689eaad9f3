"""SafeLoRA: project the updates that are least similar to alignment onto alignment's direction.

V = theta_0 - theta_b of a module's weight, C = V V^T / ||V||_F, and dW <- C dW (that is
B <- C B, which keeps the rank) in the modules chosen by cos(C dW, dW): the ``number`` least similar
ones (ties in module order), or those at or below a ``threshold``. A module that alignment did not
change has no V, and one that tuning did not change has no cosine: both are left as they are.

Source: Hsu et al. 2024, SafeLoRA (verified: C, the projection, 10 modules or 0.5 in the released
code).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.errors import UsageError

from ._spec import Defence
from ._weights import notes

if TYPE_CHECKING:
    from fastsafe.model.lora import Adapter
    from fastsafe.model.weights import TensorSource


def safe_lora(
    adapter: "Adapter",
    aligned: "TensorSource",
    unaligned: "TensorSource",
    *,
    select: str,
    number: int,
    threshold: float,
) -> tuple["Adapter", dict[str, Any]]:
    """Return the adapter with its chosen modules projected, and the record of the edit.

    Args:
        adapter: On ``aligned``.
        aligned: Checkpoint the adapter was trained on, theta_0.
        unaligned: The same model before alignment, theta_b.
        select: ``"number"`` or ``"threshold"``.
        number: Number of modules to project, at least 0.
        threshold: Largest cosine that is projected, in [-1, 1].

    Raises:
        UsageError: An argument is out of range.
        CheckpointError: ``unaligned`` has other shapes, or is the same model.
    """
    from dataclasses import replace

    from fastsafe.model.weight_edits import project_all

    if select not in ("number", "threshold") or number < 0 or not -1 <= threshold <= 1:
        raise UsageError(
            f"safe_lora: select is {select!r}, number {number}, threshold {threshold}; expected "
            "'number' or 'threshold', at least 0, and a number in [-1, 1]"
        )
    updates, cosines = project_all(adapter, aligned, unaligned)
    if select == "number":
        chosen = sorted(cosines, key=lambda module: cosines[module])[:number]  # stable
    else:
        chosen = [module for module, similar in cosines.items() if similar <= threshold]
    weights = {**adapter.weights, **{module: updates[module] for module in chosen}}
    record = {"cosine": cosines, "changed": sorted(chosen)}
    return replace(adapter, weights=weights), record


def _apply(tuned: Path, base: Path, out: Path, *, unaligned: str | Path, **params: Any) -> None:
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model.weight_edits import read_adapter

    aligned = Checkpoint(base)
    adapter = read_adapter(tuned, aligned)
    edited, record = safe_lora(adapter, aligned, Checkpoint(unaligned), **params)
    edited.save(out, notes(DEFENCE, {"unaligned": unaligned, **params}, record))


DEFENCE = Defence(
    id="safe_lora",
    stage="post",
    acts_on="weights",
    about="projects the updates least like alignment onto its direction",
    evidence="verified; Hsu et al. 2024, SafeLoRA",
    needs={"unaligned": "the checkpoint before alignment, of the same shapes"},
    params={"select": "number", "number": 10, "threshold": 0.5},
    apply=_apply,
)
