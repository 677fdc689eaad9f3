"""WiSE-FT: linear interpolation between the model before and after tuning.

theta = (1 - strength) theta_0 + strength theta_ft. For a LoRA adapter this is exactly its alpha
times ``strength``, with no change of a tensor (LoRA-scale). A tuned checkpoint gives a checkpoint.

Source: Wortsman et al. 2021, arXiv:2109.01903 (inferred that it restores safety).
"""

from pathlib import Path

from fastsafe.errors import UsageError
from fastsafe.io.weight_folder import is_adapter

from ._spec import Defence
from ._weights import notes


def _apply(tuned: Path, base: Path, out: Path, *, strength: float) -> None:
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model.edited_checkpoint import write_edited
    from fastsafe.model.weight_edits import read_adapter, scaled

    if not 0 <= strength <= 1:
        raise UsageError(f"wise_ft: strength is {strength}, expected a number in [0, 1]")
    note = notes(DEFENCE, {"strength": strength}, {})
    before = Checkpoint(base)
    if is_adapter(tuned):
        scaled(read_adapter(tuned, before), strength).save(out, note)
        return
    write_edited(
        before,
        Checkpoint(tuned),
        lambda name, start, end: (1 - strength) * start + strength * end,
        out,
        notes=note,
    )


DEFENCE = Defence(
    id="wise_ft",
    stage="post",
    acts_on="weights",
    about="takes weights between the untouched and the tuned model, by strength",
    evidence="inferred; Wortsman et al. 2021, arXiv:2109.01903",
    params={"strength": 0.5},
    apply=_apply,
)
