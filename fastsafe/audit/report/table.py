"""The terminal's tables: conditions x formats, beside over-refusal and utility."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.text import Text

from fastsafe.audit.report.curves import drift_columns
from fastsafe.audit.report.escape import escaped
from fastsafe.audit.report.fitted import Column, fitted
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
from fastsafe.audit.report.words import (
    FEW_MITIGATIONS,
    is_judged,
    mitigations,
    sentences,
    trust,
)
from fastsafe.audit.results.schema.rates import OverSeedsResult, Scope
from fastsafe.audit.results.schema.run import ConditionResult, Results

if TYPE_CHECKING:
    from rich.console import RenderableType

_DRIFT = (
    "Per format: KL(base || model) of the answer's first token on harmful probes, in nats, at the "
    "last reading. margin: log p(refusal) - log p(affirmative) of the recipe's two openings, the "
    "mean over formats."
)
_GUARDS = (
    "Share that a guard calls unsafe, % (95% Wilson interval). harmful: of harmful prompts, or of "
    "the answers that the first judge calls harmful; benign: of benign twins, or of their answers; "
    "refusals: of refusals of harmful prompts. unreadable: replies that cannot be parsed."
)
_SCOPES: Mapping[Scope, str] = {
    "plain": "plain prompts",
    "own_format": "own format",
    "all_formats": "all formats",
    "over_refusal": "benign refused",
    "utility": "utility",
}


def table_text(results: Results, width: int = 120) -> str:
    """Return the tables and the finding as plain text, at most ``width`` columns wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False)
    for part in tables(results, width):
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def tables(results: Results, width: int) -> Iterator["RenderableType"]:
    """Yield the renderables of the terminal: a table per judge and system prompt, the finding.

    No cell is ever cut: ``fitted`` says what becomes of a table that is too wide.

    Args:
        results: What ``results.json`` holds.
        width: Columns of the terminal.
    """
    results = escaped(results)
    if is_judged(results):
        for number, matrix in enumerate(matrices(results)):
            yield Text(("\n" if number else "") + _title(matrix), style="bold")
            yield from _matrix(matrix, width)
            yield Text(_legend(matrix), style="dim")
    for kind, title in SEED_TABLES.items():
        for view, rows in over_seeds(results, kind).items():
            yield Text(f"\n{title}, %, mean over training seeds, {view}", style="bold")
            yield from _seeds(rows, width)
    if len(mitigations(results)) > FEW_MITIGATIONS:
        yield Text("\nMitigations compared, % (95% interval)", style="bold")
        yield from _mitigations(results, width)
    if any(row["n"] > row["n_unread"] for row in results["guards"]):
        yield Text("\nGuards", style="bold")
        yield from _guards(results, width)
        yield Text(_GUARDS, style="dim")
    if results["drift"]:
        yield Text("\nDrift from the base during training", style="bold")
        yield from fitted(drift_columns(results), width)
        yield Text(_DRIFT, style="dim")
    if is_judged(results):
        for sentence in trust(results):
            yield Text(sentence, style="dim")
        yield Text("")
    for sentence in sentences(results):
        yield Text(sentence)


def _matrix(matrix: Matrix, width: int) -> Iterator["RenderableType"]:
    names = [tuned_on(condition) for condition in matrix.conditions]
    is_first = [name != before for name, before in zip(names, ["", *names], strict=False)]
    columns = [
        Column(
            "tuned on",
            [
                "untouched" if condition["id"] == BASE else name if first else ""
                for condition, name, first in zip(matrix.conditions, names, is_first, strict=True)
            ],
            is_label=True,
            wraps=True,
        ),
        Column(
            "mitigation",
            ["" if c["id"] == BASE else label(c["mitigation"]) for c in matrix.conditions],
            is_label=True,
            wraps=True,
        ),
    ]
    for name in matrix.formats:
        rates = [_rate(matrix.rates.get((c["id"], name))) for c in matrix.conditions]
        columns.append(Column(label(name), rates))
    if matrix.over_refusal:
        refused = [_over_refusal(matrix, condition["id"]) for condition in matrix.conditions]
        columns.append(Column("over-refusal", refused, style="dim"))
    if matrix.utility:
        values = [_utility(matrix, condition) for condition in matrix.conditions]
        columns.append(Column("utility", values, wraps=True, style="dim"))
    sections = [row for row, first in enumerate(is_first) if first and row]
    if len(sections) + 1 == len(is_first):  # one row each needs no lines between
        sections = []
    yield from fitted(columns, width, sections)


def _seeds(rows: Sequence[OverSeedsResult], width: int) -> Iterator["RenderableType"]:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    cells = {(row["condition"], row["format"]): row for row in rows}
    columns = [Column("condition", list(map(breakable, conditions)), is_label=True, wraps=True)]
    for name in dict.fromkeys(row["format"] for row in rows):
        rates = [cells[condition, name] for condition in conditions]
        columns.append(Column(label(name), [_rate_and_interval(row) for row in rates], wraps=True))
    yield from fitted(columns, width)


def _mitigations(results: Results, width: int) -> Iterator["RenderableType"]:
    rows = mitigations(results)
    columns = [Column("mitigation", [name for name, _ in rows], is_label=True, wraps=True)]
    for scope, heading in _SCOPES.items():
        if any(scope in by_scope for _, by_scope in rows):
            values = [_rate_and_interval(by_scope.get(scope)) for _, by_scope in rows]
            columns.append(Column(heading, values, wraps=True))
    yield from fitted(columns, width)


def _guards(results: Results, width: int) -> Iterator["RenderableType"]:
    rows = results["guards"]
    columns = [
        Column("guard", [row["guard"] for row in rows], is_label=True, wraps=True),
        Column("classifies", [row["target"] for row in rows], is_label=True),
        Column("format", [label(row["format"]) for row in rows], is_label=True, wraps=True),
        Column("harmful", [_rate_and_interval(row["recall"]) for row in rows], wraps=True),
        Column("benign", [_rate_and_interval(row["false_positives"]) for row in rows], wraps=True),
        Column(
            "refusals", [_rate_and_interval(row["refusals_flagged"]) for row in rows], wraps=True
        ),
        Column("unreadable", [f"{row['n_unreadable']} of {row['n']}" for row in rows], wraps=True),
    ]
    yield from fitted(columns, width)


def _rate_and_interval(row: Mapping[str, object] | None) -> str:
    if row is None or row["rate"] is None:
        return "-"
    return f"{percent(cast(float, row['rate']))} ({interval(row)})"


def _title(matrix: Matrix) -> str:
    prompt = f", system prompt {matrix.system_prompt}" if matrix.system_prompt != "none" else ""
    quantity = "Harmful prompts answered, % (lower is safer)"
    if not matrix.answer:
        quantity = "Benign prompts refused, % (no harmful prompts were asked)"
    return f"{quantity}, judge {matrix.judge}{prompt}"


def _rate(row: AnyCell | None) -> Text:
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


def _utility(matrix: Matrix, condition: ConditionResult) -> str:
    row = matrix.utility.get((condition["id"], condition["task"] or ""))
    if row is None or row["value"] is None:
        return ""
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
