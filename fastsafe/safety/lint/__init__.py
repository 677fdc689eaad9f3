"""Lint of fine-tuning and safety data: what would teach a model the wrong thing.

The rules, by the names of ``fastsafe lint --json``; each file says what it finds and misses:

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
from ._rows import Declared, Kind, LintFinding, LintRow, Rule, Set, lint_rows

__all__ = ["Declared", "Kind", "LintFinding", "Report", "Rule", "lint"]

SAFETY_SHARE = 0.5  # of answers that open with a refusal, from which a set is a safety set

_RULES = (duplicates, answers, templates, languages, balance, licences)


@dataclass(frozen=True)
class Report:
    """What the linter found."""

    num_rows: int
    num_safety: int  # rows that were read as safety rows
    findings: tuple[LintFinding, ...]  # by row, one per rule and row
    notes: tuple[str, ...]  # worth knowing, and no flaw of a row

    @property
    def rules(self) -> dict[str, int]:
        """Number of findings of each rule that found something."""
        return dict(Counter(each.rule for each in self.findings))

    def record(self) -> dict[str, Any]:
        """Return the report as ``fastsafe lint --json`` prints it: no text of the set."""
        return {
            "rows": self.num_rows,
            "findings": [
                {"rule": each.rule, "row": each.row, "detail": each.detail}
                for each in self.findings
            ],
        }


def lint(
    rows: Sequence[Row],
    *,
    kind: Kind | Literal["auto"] = "auto",
    probes: Sequence[str] = (),
    declared: Declared | None = None,
) -> Report:
    """Look for flaws.

    Args:
        rows: Of the kinds of ``fastsafe.data.conversation``. Other columns that are read:
            ``source`` ("user" or "safety"), ``expected`` ("refuse" or "comply"),
            ``safety_format``, ``lang``, ``licence``.
        kind: Whether rows should refuse ("safety") or answer ("user"). A row's own ``expected``
            or ``source`` wins; "auto" takes for the others what at least half of their answers
            do: open with a refusal or not.
        probes: Texts that no row may hold.
        declared: What is known of the set beside its columns.

    Raises:
        DataError: A row is malformed or token ids.
    """
    declared = declared or Declared()
    items = lint_rows(rows, refusal.JUDGE)
    unsaid = [item for item in items if _said(item) is None]
    if kind == "auto":
        refusing = sum(item.refuses for item in unsaid)
        kind = "safety" if unsaid and refusing >= SAFETY_SHARE * len(unsaid) else "user"
    safety = [item for item in items if (_said(item) or kind) == "safety"]
    user = [item for item in items if (_said(item) or kind) == "user"]
    found = Set(items, safety, user)
    raw = [finding for rule in _RULES for finding in rule(found, declared)]
    raw += probe_leaks(found, probes)
    once: dict[tuple[int, str], LintFinding] = {}
    for each in raw:
        earlier = once.setdefault((each.row, each.rule), each)
        if earlier is not each:
            joined = earlier._replace(detail=f"{earlier.detail}; {each.detail}")
            once[each.row, each.rule] = joined
    findings = tuple(once[key] for key in sorted(once))
    return Report(len(items), len(safety), findings, tuple(_notes(found, declared)))


def _said(item: LintRow) -> Kind | None:
    """What a row itself says it is."""
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


def _notes(rows: Set, declared: Declared) -> list[str]:
    notes = []
    if rows.safety and not any(item.label("expected") == "comply" for item in rows.user):
        notes.append("no benign twins: what the safety rows do to over-refusal stays unseen")
    if rows.safety and not any(item.format(declared) for item in rows.safety):
        notes.append("no safety row says its format: balance over formats is not known")
    if not any(item.label("licence", "license") or declared.licence for item in rows.items):
        notes.append("no licence is declared")
    if phrase := common_phrase(rows.safety):
        notes.append(phrase)
    return notes
