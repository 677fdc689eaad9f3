"""Curves over training steps, losses and drift, drawn as SVG lines or as block characters."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal, NamedTuple

from fastsafe.audit.report.fitted import Column
from fastsafe.audit.report.matrix import breakable, label
from fastsafe.audit.results.schema.run import DriftResult, Results

WIDTH, HEIGHT = 100, 30  # of an SVG curve
_BLOCKS = "▁▂▃▄▅▆▇█"

Readings = Mapping[str, Mapping[str, Sequence[DriftResult]]]  # condition -> format -> rows


class Scale(NamedTuple):
    """Range of values that curves of one kind share, 0 included, so that they can be compared."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return the position of a value on the scale, in [0, 1]."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0

    def y(self, value: float) -> str:
        """Return the SVG y coordinate of a value."""
        return f"{1 + (HEIGHT - 2) * (1 - self.share(value)):.1f}"

    def points(self, values: Sequence[float]) -> str:
        """Return the points of a polyline; it averages values where there are more than pixels."""
        short = _means(values, WIDTH)
        step = WIDTH / max(1, len(short) - 1)
        return " ".join(f"{i * step:.1f},{self.y(value)}" for i, value in enumerate(short))

    def blocks(self, values: Sequence[float], most: int = 8) -> str:
        """Return the values as at most ``most`` block characters."""
        places = (self.share(value) for value in _means(values, most))
        return "".join(_BLOCKS[min(7, int(8 * place))] for place in places)


@dataclass(frozen=True)
class Curves:
    """Losses and drift readings of a run's training.

    Attributes:
        losses: Training loss of every step, by condition.
        drift: Drift readings by condition and format, in the order of steps.
    """

    losses: Mapping[str, Sequence[float]]
    drift: Readings

    def scale(self, name: Literal["loss", "kl", "margin"]) -> Scale:
        """Return the scale that all curves of one kind share."""
        if name == "loss":
            values = [value for losses in self.losses.values() for value in _means(losses, WIDTH)]
        else:
            formats = [rows for by_format in self.drift.values() for rows in by_format.values()]
            values = [row[name] for rows in formats for row in rows]
        return Scale(min((0.0, *values)), max((0.0, *values)))


def curves(results: Results, losses: Mapping[str, Sequence[float]]) -> Curves:
    """Collect the curves of a run; a condition that took no step has none."""
    order = [condition["id"] for condition in results["conditions"]]
    shown = {name: losses[name] for name in order if losses.get(name)}
    drift: dict[str, dict[str, list[DriftResult]]] = defaultdict(lambda: defaultdict(list))
    for row in results["drift"]:
        drift[row["condition"]][row["format"]].append(row)
    return Curves(shown, drift)


def drift_columns(results: Results) -> list[Column]:
    """Return the drift table's columns: per format a curve and the last reading."""
    drift = curves(results, {})
    scale = drift.scale("kl")
    columns = [Column("condition", list(map(breakable, drift.drift)), is_label=True, wraps=True)]
    rows = list(drift.drift.values())
    for name in dict.fromkeys(row["format"] for row in results["drift"]):
        kls = [[row["kl"] for row in by_format[name]] for by_format in rows]
        cells = [f"{scale.blocks(kl, 4)} {kl[-1]:.2f}" for kl in kls]
        columns.append(Column(label(name), cells, wraps=True))
    ends = [next(iter(by_format.values()))[-1] for by_format in rows]
    return [
        *columns,
        Column("margin", list(map(_margins, rows)), wraps=True),
        Column("steps", [f"{'stopped, ' if e['stopped'] else ''}{e['step']}" for e in ends]),
    ]


def _margins(by_format: Mapping[str, Sequence[DriftResult]]) -> str:
    first, last = (fmean(rows[i]["margin"] for rows in by_format.values()) for i in (0, -1))
    return f"{first:+.1f} to {last:+.1f}"


def _means(values: Sequence[float], most: int) -> list[float]:
    """Return at most ``most`` values, each the mean over an equal share of the steps."""
    count = min(most, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(bounds)]
