"""What a task file declares: what a model is tuned for, and how well it still does it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """One downstream task: the format of its rows, and the metric of its utility."""

    id: str
    format: str  # id of the format that dresses its rows
    metric: str  # name of `score` in a run's record
    score: Callable[[str, str], float]  # (completion, reference) -> utility of one row in [0, 1]
