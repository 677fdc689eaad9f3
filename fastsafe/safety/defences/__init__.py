"""Defences after training: edits of weights, prompts or answers, one per file.

Another package adds one by an entry point of the group ``fastsafe.defences`` that names a
`Defence`. Mitigations by data are in ``safety.mixing``, those by training in ``train.objectives``.
"""

from pathlib import Path
from typing import Any

from fastsafe.errors import UsageError
from fastsafe.safety.plugins import collect, shipped_parts

from ._spec import Defence
from ._system import Messages
from .guard_filter import Screened, UnsafeOdds

__all__ = ["Defence", "Messages", "Screened", "UnsafeOdds", "apply_posthoc", "defences"]


def defences() -> dict[str, Defence]:
    """Return every defence by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two defences have one id, or an entry point names something else.

    Example:
        >>> list(defences())
        ['counter_prompt', 'guard_filter', 'ptst', 'resta', 'safe_lora', 'safe_merge', \
'self_reminder', 'wise_ft']
    """
    return collect(shipped_parts(__name__, __path__, "DEFENCE"), "fastsafe.defences", Defence)


def apply_posthoc(
    defence: Defence, tuned: str | Path, base: str | Path, out_dir: str | Path, **params: Any
) -> Path:
    """Apply a defence to the result of a fine-tuning.

    Args:
        defence: Of the stage ``"post"``.
        tuned: PEFT folder; ``resta`` and ``wise_ft`` also take a tuned checkpoint.
        base: Folder of the checkpoint that was tuned; not modified.
        out_dir: Folder to write, atomically: an adapter where the edit gives one, else a
            checkpoint. Its ``defence.json`` records the defence and its parameters.
        **params: Parameters in ``defence.needs`` and ``defence.params``.

    Returns:
        ``out_dir``.

    Raises:
        UsageError: The defence edits no weights, a parameter is unknown, missing or out of range,
            or ``out_dir`` is one of the inputs.
        AdapterError: An adapter is malformed or does not fit.
        CheckpointError: A checkpoint is malformed or does not fit.
    """
    if defence.acts_on != "weights":
        raise UsageError(
            f"defence {defence.id}: acts on the {defence.acts_on}, expected one that edits weights"
        )
    arguments = defence.arguments(params)
    out = Path(out_dir)
    inputs = [tuned, base, *(arguments[name] for name in defence.needs)]
    paths = [Path(given) for given in inputs if isinstance(given, str | Path)]
    if any(out.resolve() == path.resolve() for path in paths):
        raise UsageError(f"defence {defence.id}: {out} is read, too; write to another folder")
    defence.apply(Path(tuned), Path(base), out, **arguments)
    return out
