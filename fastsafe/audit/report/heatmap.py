"""The heat map: one SVG with answer rates, over-refusal and utility of every condition."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastsafe.audit.report.escape import escaped
from fastsafe.audit.report.matrix import (
    ALPHA,
    BASE,
    MUTE,
    Matrix,
    label,
    matrices,
    percent,
    sign,
    tuned_on,
)
from fastsafe.audit.report.palette import FAINT, INK, Quantity, fill, ink
from fastsafe.audit.results.schema.run import ConditionResult, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_INCHES = 0.78, 0.30
_GAP = 0.35  # of a row, between tasks

Square = tuple[float | None, str]  # rate, mark
SquareOf = Callable[[ConditionResult, str], Square | None]  # condition, column -> square
Block = tuple[str, Quantity, Sequence[str], SquareOf]  # title, quantity, columns, squares


def heatmap_svg(results: Results) -> str:
    """Return the heat map of the first judge and system prompt as SVG.

    The same results give the same bytes: no date, no random ids, glyphs as outlines.
    """
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "fastsafe",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "text.color": INK,
    }
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": "fastsafe", "Title": "fastsafe audit"}
    with matplotlib.rc_context(settings):
        _figure(escaped(results)).savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


def _figure(results: Results) -> "Figure":
    from matplotlib.figure import Figure

    matrix = next(matrices(results))
    rows = list(matrix.conditions)
    places = _places(rows)
    height = places[-1] + 1
    blocks = _blocks(matrix)
    widths = [len(columns) for _, _, columns, _ in blocks]
    cell_w, cell_h = _CELL_INCHES
    left, right, top, bottom, between = 2.15, 0.15, 0.85, 0.62, 0.32
    total_w = left + cell_w * sum(widths) + between * (len(blocks) - 1) + right
    total_h = top + cell_h * height + bottom
    figure = Figure(figsize=(total_w, total_h), facecolor="white")
    x = left
    for number, (title, quantity, columns, square_of) in enumerate(blocks):
        width = cell_w * len(columns)
        box = (x / total_w, bottom / total_h, width / total_w, cell_h * height / total_h)
        axes = figure.add_axes(box)
        _draw(axes, title, quantity, columns, rows, places, square_of)
        if number == 0:
            _label_rows(axes, rows, places)
        x += width + between
    for y, text in ((0.27, _caption(matrix)), (0.09, _caption_marks())):
        figure.text(left / total_w, y / total_h, text, color=FAINT, size=7.5)
    return figure


def _places(rows: Sequence[ConditionResult]) -> list[float]:
    """Return the y coordinate of each condition, with a gap between tasks."""
    places, y = [], 0.0
    for i, row in enumerate(rows):
        if i:
            y += 1 + (_GAP if tuned_on(row) != tuned_on(rows[i - 1]) else 0)
        places.append(y)
    return places


def _blocks(matrix: Matrix) -> list[Block]:
    def answered(condition: ConditionResult, name: str) -> Square | None:
        row = matrix.answer.get((condition["id"], name))
        return (row["answer_rate"], sign(row)) if row else None

    def refused(condition: ConditionResult, name: str) -> Square | None:
        row = matrix.over_refusal.get((condition["id"], name))
        return (row["over_refusal_rate"], sign(row)) if row else None

    def useful(condition: ConditionResult, name: str) -> Square | None:
        row = matrix.utility.get((condition["id"], condition["task"] or ""))
        return (row["value"], "") if row else None

    formats = list(matrix.formats)
    blocks: list[Block] = []
    if matrix.answer:
        blocks.append(("Harmful prompts answered, %", "answered", formats, answered))
    if matrix.over_refusal:
        blocks.append(("Benign twins refused, %", "refused", formats, refused))
    if matrix.utility:
        blocks.append(("Utility, %", "utility", ["own task"], useful))
    return blocks


def _draw(
    axes: "Axes",
    title: str,
    quantity: Quantity,
    columns: Sequence[str],
    rows: Sequence[ConditionResult],
    places: Sequence[float],
    square_of: SquareOf,
) -> None:
    from matplotlib.patches import Rectangle

    for row, y in zip(rows, places, strict=True):
        for x, name in enumerate(columns):
            rate, mark = square_of(row, name) or (None, "")
            if rate is None:
                continue
            colour = fill(quantity, rate)
            style: Any = {"va": "center", "color": ink(colour)}
            axes.add_patch(
                Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2)
            )
            axes.text(x + 0.5, y + 0.54, percent(rate), ha="center", **style)
            if mark:
                axes.text(x + 0.84, y + 0.53, mark, ha="center", size=5, **style)
    for name, own_format in dict.fromkeys((tuned_on(row), row["own_format"]) for row in rows):
        if own_format in columns:
            ys = [y for row, y in zip(rows, places, strict=True) if tuned_on(row) == name]
            corner = (columns.index(own_format), ys[0])
            axes.add_patch(
                Rectangle(corner, 1, ys[-1] + 1 - ys[0], fill=False, edgecolor=INK, linewidth=1.5)
            )
    axes.set_xlim(0, len(columns))
    axes.set_ylim(places[-1] + 1, 0)
    axes.set_axis_off()
    for x, name in enumerate(columns):
        axes.text(
            x + 0.5, -0.28, _broken(label(name)), ha="center", va="bottom", color=INK, size=7.5
        )
    axes.text(0, -1.35, title, ha="left", va="bottom", weight="bold", size=9)


def _label_rows(axes: "Axes", rows: Sequence[ConditionResult], places: Sequence[float]) -> None:
    last = ""
    for row, y in zip(rows, places, strict=True):
        if row["id"] == BASE:
            axes.text(-0.18, y + 0.54, "untouched model", ha="right", va="center", weight="bold")
            continue
        axes.text(-0.18, y + 0.54, label(row["mitigation"]), ha="right", va="center")
        if tuned_on(row) != last:
            axes.text(-2.68, y + 0.54, tuned_on(row), ha="left", va="center", weight="bold")
        last = tuned_on(row)
    axes.text(-2.68, -0.28, "tuned on", ha="left", va="bottom", color=FAINT, size=7.5)
    axes.text(-0.18, -0.28, "mitigation", ha="right", va="bottom", color=FAINT, size=7.5)


def _broken(name: str) -> str:
    """Return a column name with line breaks if it is too long for its cell."""
    return name.replace(" ", "\n") if len(name) > 11 else name


def _caption(matrix: Matrix) -> str:
    text = (
        f"{matrix.behaviours_text()}; 95% intervals reach at most "
        f"{100 * matrix.half_width():.0f} points from the rate. Outlined: the tuned task's format."
    )
    return f"{text} Utility: {matrix.test_rows_text()}." if matrix.utility else text


def _caption_marks() -> str:
    return (
        "▲ ▼  rose or fell against the untouched model on the same prompts: exact McNemar, "
        f"Holm-corrected, p < {ALPHA}. ∅  over {MUTE:.0%} empty answers."
    )
