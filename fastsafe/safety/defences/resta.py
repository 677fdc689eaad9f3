"""RESTA: add back the direction in weight space in which alignment made the model safe.

theta = theta_0 + DARE_drop(theta_ft - theta_0) + gamma (theta_0 - theta_b). DARE drops entries of
the update with probability ``drop`` and rescales the rest by 1 / (1 - drop) (unverified). The
unsafe model of the paper would need harmful completions; the public checkpoint before alignment,
theta_b, stands in for it (inferred).

Neither term has low rank, so the result for an adapter is a checkpoint, too. The base and the
adapter are not modified.

Source: Bhardwaj et al. 2024, arXiv:2402.11746 (effect verified by the abstract; formula
unverified).
"""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from fastsafe.errors import UsageError
from fastsafe.io.weight_folder import is_adapter

from ._spec import Defence
from ._weights import notes

if TYPE_CHECKING:
    from torch import Tensor


def _apply(
    tuned: Path,
    base: Path,
    out: Path,
    *,
    unaligned: str | Path,
    gamma: float,
    drop: float,
    seed: int,
    tensors: str,
) -> None:
    """Write the checkpoint.

    Args:
        tuned: Adapter or checkpoint, theta_ft.
        base: Checkpoint before tuning, theta_0.
        out: Folder to write.
        unaligned: Checkpoint before alignment, theta_b.
        gamma: Length of the step towards safety, finite and at least 0.
        drop: Share of the update's entries that DARE drops, in [0, 1).
        seed: Of what is dropped.
        tensors: Tensors that take the safety step: ``"all"``, or ``"linear"`` for the weights of
            attention and MLP alone, which allows an unaligned model with another vocabulary.
    """
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model.config import ModelConfig
    from fastsafe.model.edited_checkpoint import dare, write_edited
    from fastsafe.model.transformer import slots
    from fastsafe.model.weight_edits import read_adapter, read_like, wide

    if not (0 <= drop < 1 and gamma >= 0 and isfinite(gamma)) or tensors not in ("all", "linear"):
        raise UsageError(
            f"resta: gamma is {gamma}, drop {drop}, tensors {tensors!r}; expected a finite number "
            "of at least 0, one in [0, 1), and 'all' or 'linear'"
        )
    before, unsafe = Checkpoint(base), Checkpoint(unaligned)
    config = ModelConfig.from_json(before.config(), f"{before.path}/config.json")
    linear = {f"{module}.weight" for module in slots(config)}

    def edit(name: str, start: "Tensor", end: "Tensor") -> "Tensor":
        total = dare(start, end, drop, seed, name)
        if gamma and (tensors == "all" or name in linear):
            total = total + gamma * (start - wide(read_like(unsafe, name, before)))
        return total

    given = {"unaligned": unaligned, "gamma": gamma, "drop": drop, "seed": seed, "tensors": tensors}
    after = read_adapter(tuned, before) if is_adapter(tuned) else Checkpoint(tuned)
    write_edited(before, after, edit, out, notes=notes(DEFENCE, given, {}))


DEFENCE = Defence(
    id="resta",
    stage="post",
    acts_on="weights",
    about="adds the change of weights that aligned the model to the tuned weights",
    evidence="effect verified, formula unverified; Bhardwaj et al. 2024, arXiv:2402.11746",
    needs={"unaligned": "the checkpoint before alignment, of the same shapes"},
    params={"gamma": 0.5, "drop": 0.0, "seed": 0, "tensors": "all"},
    apply=_apply,
)
