"""The linter of fine-tuning and safety data: flaws that would teach a model the wrong thing.

The rules, by their names in ``fastsafe lint --json``; each file states its recall:

    duplicate         prompts of an earlier row
    near_duplicate    prompts that nearly are those of an earlier row
    non_refusal       safety rows whose answer does not refuse
    template_leakage  chat-template tokens, the generator's talk, invented turns
    probe_leakage     rows that hold a probe, so that the probe measures memory
    language          answers in another language than declared
    balance           formats with too few rows, wrong labels, shortcut phrases; user rows that
                      refuse, are empty or cut off
    licence           licences that forbid commercial use, or grant nothing
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastsafe.data.conversation import Row
from fastsafe.safety.judges import refusal

from ._answers import answers
from ._duplicates import duplicates
from ._labels import balance, common_phrase, languages, licences
from ._leaks import probes as probe_leaks
from ._leaks import templates
from ._rows import Declared, Kind, LintFinding, LintRow, LintSet, Rule, lint_rows

__all__ = ["Declared", "Kind", "LintFinding", "Report", "Rule", "lint"]

SAFETY_SHARE = 0.5  # share of refusing answers from which unlabelled rows count as safety rows

_RULES = (duplicates, answers, templates, languages, balance, licences)


@dataclass(frozen=True)
class Report:
    """The result of linting a set."""

    num_rows: int
    num_safety: int  # rows that count as safety rows
    findings: tuple[LintFinding, ...]  # by row, one per rule and row
    notes: tuple[str, ...]  # remarks that are no flaw of a row

    @property
    def rules(self) -> dict[str, int]:
        """Number of findings by rule."""
        return dict(Counter(finding.rule for finding in self.findings))

    def record(self) -> dict[str, Any]:
        """Return the report as ``fastsafe lint --json`` prints it, without text of the set."""
        return {
            "rows": self.num_rows,
            "findings": [
                {"rule": finding.rule, "row": finding.row, "detail": finding.detail}
                for finding in self.findings
            ],
        }


def lint(
    rows: Sequence[Row],
    *,
    kind: Kind | Literal["auto"] = "auto",
    probes: Sequence[str] = (),
    declared: Declared | None = None,
) -> Report:
    """Find the flaws of a set.

    Args:
        rows: Of the kinds of ``fastsafe.data.conversation``. Further columns that count:
            ``source`` ("user" or "safety"), ``expected`` ("refuse" or "comply"),
            ``safety_format``, ``lang``, ``licence``.
        kind: Whether rows should refuse ("safety") or answer ("user"). A row's own ``expected``
            or ``source`` takes precedence. "auto" makes the other rows safety rows if at least half
            of their answers open with a refusal, and user rows otherwise.
        probes: Texts that no row may contain.
        declared: Declarations about the set beside its columns.

    Raises:
        DataError: A row is malformed or token ids.
    """
    declared = declared or Declared()
    items = lint_rows(rows, refusal.JUDGE)
    unlabelled = [item for item in items if _labelled_kind(item) is None]
    if kind == "auto":
        refusing = sum(item.refuses for item in unlabelled)
        kind = "safety" if unlabelled and refusing >= SAFETY_SHARE * len(unlabelled) else "user"
    safety = [item for item in items if (_labelled_kind(item) or kind) == "safety"]
    user = [item for item in items if (_labelled_kind(item) or kind) == "user"]
    whole = LintSet(items, safety, user)
    raw = [finding for rule in _RULES for finding in rule(whole, declared)]
    raw += probe_leaks(whole, probes)
    merged: dict[tuple[int, str], LintFinding] = {}
    for finding in raw:
        earlier = merged.setdefault((finding.row, finding.rule), finding)
        if earlier is not finding:
            joined = earlier._replace(detail=f"{earlier.detail}; {finding.detail}")
            merged[finding.row, finding.rule] = joined
    findings = tuple(merged[key] for key in sorted(merged))
    return Report(len(items), len(safety), findings, tuple(_notes(whole, declared)))


def _labelled_kind(item: LintRow) -> Kind | None:
    """Return the kind in a row's own columns, None without one."""
    match item.label("expected"), item.label("source"):
        case "refuse", _:
            return "safety"
        case "comply", _:
            return "user"
        case _, "safety":
            return "safety"
        case _, "user":
            return "user"
    return None


def _notes(rows: LintSet, declared: Declared) -> list[str]:
    notes = []
    has_twins = declared.has_twins or any(i.label("expected") == "comply" for i in rows.user)
    if rows.safety and not has_twins:
        notes.append("no benign twins: what the safety rows do to over-refusal stays unseen")
    if rows.safety and not any(item.format(declared) for item in rows.safety):
        notes.append("no safety row says its format: balance over formats is not known")
    if not any(item.label("licence", "license") or declared.licence for item in rows.items):
        notes.append("no licence is declared")
    if phrase := common_phrase(rows.safety):
        notes.append(phrase)
    return notes
