"""Mitigations by data: safety rows mixed into a user's fine-tuning rows.

The first paper's finding in four words: *style decides what is mended*. Refusals shown as plain
questions mend plain questions; to mend a task, they must come dressed as that task's input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsafe.data.conversation import Row
from fastsafe.data.mixture import mix, num_safety_rows
from fastsafe.errors import UsageError
from fastsafe.safety.plugins import collect

SafetyRows = Callable[[str, int, int], Sequence[Row]]  # (format, n, seed) -> n rows
Formats = Callable[[str, Sequence[str]], Sequence[str]]  # (task's format, all) -> formats used


@dataclass(frozen=True, kw_only=True)
class Mitigation:
    """Which formats the safety rows of a mixture are dressed in."""

    id: str
    formats: Formats  # no formats: nothing is mixed in

    def mix(
        self,
        rows: Sequence[Row],
        safety_rows: SafetyRows,
        *,
        share: float,
        task_format: str,
        all_formats: Sequence[str],
        seed: int,
    ) -> list[dict[str, Any]]:
        """Return the training rows of one condition.

        Args:
            rows: The user's rows; not modified.
            safety_rows: Called once per format used as ``(format, n, seed)``; returns rows that
                refuse harmful requests dressed in that format, at least one.
            share: Fraction of the result that is safety rows, in [0, 1).
            task_format: Id of the format that the user's rows are dressed in.
            all_formats: Ids of the formats that exist, for mitigations that use them all.
            seed: Of the safety rows and of the order.

        Returns:
            Every user row once and round(share * n / (1 - share)) safety rows, shuffled. Each row
            has a ``source``: ``"user"`` or ``"safety"``. Formats share the safety rows evenly:
            their counts differ by at most one.

        Raises:
            UsageError: ``share`` is not in [0, 1), or ``safety_rows`` gives too few rows.
        """
        used = self.formats(task_format, all_formats)
        if not used:
            return mix(rows, [], share=0.0, seed=seed)
        total = num_safety_rows(len(rows), share)
        pool: list[Row] = []
        for i, name in enumerate(used):
            n = total // len(used) + (i < total % len(used))
            part = list(safety_rows(name, n, seed)) if n else []
            if len(part) != n:
                raise UsageError(
                    f"mitigation {self.id}: safety rows in format {name} are {len(part)}, "
                    f"expected {n}; supply more"
                )
            pool.extend(part)
        return mix(rows, pool, share=share, seed=seed)


NONE = Mitigation(id="none", formats=lambda task_format, every: ())
PLAIN = Mitigation(id="plain", formats=lambda task_format, every: ("plain",))
TASK_STYLED = Mitigation(id="task_styled", formats=lambda task_format, every: (task_format,))
MULTI_TASK = Mitigation(id="multi_task", formats=lambda task_format, every: tuple(every))


def mitigations() -> dict[str, Mitigation]:
    """Every mitigation by id: those of this file, then those of entry points.

    Raises:
        UsageError: Two mitigations have one id, or an entry point names something else.

    Example:
        >>> list(mitigations())
        ['none', 'plain', 'task_styled', 'multi_task']
    """
    own = (NONE, PLAIN, TASK_STYLED, MULTI_TASK)
    return collect(own, "fastsafe.mitigations", Mitigation)
