"""The terminal table: conditions x formats, beside over-refusal and utility."""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastsafe.audit.report.curves import drift_table
from fastsafe.audit.report.escape import escaped
from fastsafe.audit.report.matrix import (
    ALPHA,
    BASE,
    MUTE,
    SEED_TABLES,
    AnyCell,
    Matrix,
    breakable,
    half_width,
    interval,
    is_mute,
    label,
    mark,
    matrices,
    over_seeds,
    percent,
    points,
    rate_of,
    sign,
    spread,
    tuned_on,
)
from fastsafe.audit.report.words import sentences, trust
from fastsafe.audit.results.schema.rates import OverSeedsResult
from fastsafe.audit.results.schema.run import ConditionResult, Results

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_WIDE, _NARROW = 112, 84  # columns
_DRIFT = (
    "Per format: KL(base || model) of the answer's first token on harmful probes, in nats, at the "
    "last reading. margin: log p(refusal) - log p(affirmative) of the recipe's two openings, the "
    "mean over formats."
)


def table_text(results: Results, width: int = 120) -> str:
    """Return the tables and the finding as plain text, at most ``width`` columns wide."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False)
    for part in tables(results, width):
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def tables(results: Results, width: int) -> Iterator["RenderableType"]:
    """Yield the renderables of the terminal: a table per judge and system prompt, the finding.

    Args:
        results: What ``results.json`` holds.
        width: Columns of the terminal; below 112 long words are cut short and intervals over
            seeds have a line of their own, below 84 the change of utility is left out.
    """
    from rich.text import Text

    results = escaped(results)
    for matrix in matrices(results):
        yield Text(_title(matrix), style="bold")
        yield _table(matrix, width)
        yield Text(_legend(matrix), style="dim")
    for kind, title in SEED_TABLES.items():
        for view, rows in over_seeds(results, kind).items():
            yield Text(f"{title}, %, mean over training seeds, {view}", style="bold")
            yield _seeds(rows, width)
    if results["drift"]:
        yield Text("\nDrift from the base during training", style="bold")
        yield drift_table(results, width)
        yield Text(_DRIFT, style="dim")
    for sentence in trust(results):
        yield Text(sentence, style="dim")
    yield Text("")
    for sentence in sentences(results):
        yield Text(sentence)


def _seeds(rows: Sequence[OverSeedsResult], width: int) -> "RenderableType":
    from rich import box
    from rich.table import Table

    is_wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    formats = list(dict.fromkeys(row["format"] for row in rows))
    table.add_column("condition", overflow="fold")
    for name in formats:
        table.add_column(_cut(name, 99 if is_wide else 9), justify="right", no_wrap=True)
    cells = {(row["condition"], row["format"]): row for row in rows}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        table.add_row(
            condition if is_wide else breakable(condition),
            *(_seed_rate(cells[condition, name], is_wide=is_wide) for name in formats),
        )
    return table


def _seed_rate(row: OverSeedsResult, *, is_wide: bool) -> str:
    if is_wide:
        return f"{percent(row['rate'])} ({interval(row)})"
    return f"{percent(row['rate'])}\n{percent(row['ci_low'])}\u2013{percent(row['ci_high'])}"


def _title(matrix: Matrix) -> str:
    prompt = f", system prompt {matrix.system_prompt}" if matrix.system_prompt != "none" else ""
    quantity = "Harmful prompts answered, % (lower is safer)"
    if not matrix.answer:
        quantity = "Benign prompts refused, % (no harmful prompts were asked)"
    return f"{quantity}, judge {matrix.judge}{prompt}"


def _table(matrix: Matrix, width: int) -> "RenderableType":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    longest = 99 if width >= _WIDE else 9 if width >= _NARROW else 7
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if width >= _WIDE else (0, 0, 0, int(width >= _NARROW)),
        pad_edge=False,
    )
    table.add_column("tuned on", no_wrap=True)
    table.add_column("mitigation", no_wrap=True)
    for name in matrix.formats:
        table.add_column(_cut(name, longest), justify="right")
    if matrix.over_refusal:
        table.add_column("over-\nrefusal", justify="right", style="dim")
    if matrix.utility:
        table.add_column("utility", justify="right", style="dim")
    last = ""
    for condition in matrix.conditions:
        name = tuned_on(condition)
        is_base = condition["id"] == BASE
        is_first, last = name != last, name
        if is_first and not is_base:
            table.add_section()
        shown = "untouched" if is_base else name
        # a long name is cut, but not the seed at its end
        words, hash_sign, seed = shown.partition(" #")
        cells = [Text(_cut(words, max(longest, 9)) + hash_sign + seed if is_first else "")]
        cells.append(Text("" if is_base else label(condition["mitigation"])))
        cells += [_rate(matrix.rates.get((condition["id"], name))) for name in matrix.formats]
        if matrix.over_refusal:
            cells.append(Text(_over_refusal(matrix, condition["id"])))
        if matrix.utility:
            cells.append(Text(_utility(matrix, condition, is_brief=width < _NARROW)))
        table.add_row(*cells)
    return table


def _cut(name: str, longest: int) -> str:
    words = label(name)
    return words if len(words) <= longest else f"{words[: longest - 1]}."


def _rate(row: AnyCell | None) -> "Text":
    from rich.text import Text

    rate = rate_of(row) if row else None
    if row is None or rate is None:
        return Text("-")
    style = "green" if rate <= 0.1 and not is_mute(row) else "yellow" if rate < 0.5 else "red"
    return Text(f"{percent(rate)} {sign(row) or ' '}", style=style)


def _over_refusal(matrix: Matrix, condition: str) -> str:
    rate = matrix.pooled_over_refusal(condition).rate
    rows = [matrix.over_refusal.get((condition, name)) for name in matrix.formats]
    marks = {mark(row) for row in rows if row}
    return f"{percent(rate)} {'▲' if '▲' in marks else ' '}"


def _utility(matrix: Matrix, condition: ConditionResult, *, is_brief: bool) -> str:
    row = matrix.utility.get((condition["id"], condition["task"] or ""))
    if row is None or row["value"] is None:
        return ""
    if is_brief:
        return percent(row["value"])
    return f"{percent(row['value'])} ({points(row['delta'])})"


def _legend(matrix: Matrix) -> str:
    lines = [
        f"{matrix.behaviours_text()}; 95% Wilson intervals reach at most "
        f"{100 * matrix.half_width():.0f} points from the rate; report.html has them all.",
        f"▲ ▼: significantly above or below the untouched model on the same behaviours (exact "
        f"McNemar, Holm-corrected over all cells of this judge, p < {ALPHA}).",
    ]
    if any(map(is_mute, matrix.answer.values())):
        lines.append(
            f"∅: over {MUTE:.0%} of the answers are empty; a low rate does not mean safety."
        )
    if matrix.over_refusal:
        pooled = [matrix.pooled_over_refusal(c["id"]) for c in matrix.conditions]
        reach = half_width((rate.rate, rate.ci_low, rate.ci_high) for rate in pooled)
        lines.append(
            f"over-refusal: benign twins refused, % over all formats "
            f"(n = {spread(rate.n_scored for rate in pooled)}, to within "
            f"{100 * reach:.0f} points); "
            "▲: significantly above the untouched model in a format."
        )
    if matrix.utility:
        lines.append(
            f"utility: mean score on the tuned task's test rows, % ({matrix.test_rows_text()}); in "
            "brackets the change against the untouched model in points."
        )
    return "\n".join(lines)
