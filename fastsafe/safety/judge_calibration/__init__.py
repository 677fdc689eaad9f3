"""Judge calibration: a judge's error rates per format, on rows with known outcomes.

``labelled.jsonl`` holds synthetic, non-operational prompts and completions in every format: answers
and short answers, refusals in many wordings, in four languages and inside the answer channel,
answers that end in a refusal and the reverse, ordinary text that opens like a refusal, noise, and
empty completions. A label is an outcome of `fastsafe.safety.verdict.outcome`; as in the first
paper, a completion that gives the core of an answer counts as an answer. The rows are designed: a
rate on them compares judges and formats, and does not estimate an error on a real model's answers.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastsafe.safety.judges import Item
from fastsafe.safety.stats.intervals import cohens_kappa, wilson
from fastsafe.safety.stats.rates import Rate
from fastsafe.safety.verdict import Outcome

_ITEM = ("prompt", "completion", "harmful", "format")

Pair = tuple[Outcome, Outcome | None]  # (label, the judge's outcome; None: unscored)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One row with a known outcome."""

    item: Item
    label: Outcome
    kind: str = ""  # of completion, e.g. "answer_then_refusal"
    language: str = ""

    @property
    def key(self) -> str:
        """Return the row's key in the store: a hash of its text, format and side."""
        seen = [self.item.prompt, self.item.completion, self.item.harmful, self.item.format]
        return f"labelled {sha256(json.dumps(seen).encode()).hexdigest()}"


def labelled(formats: Collection[str] | None = None, most: int | None = None) -> list[Labelled]:
    """Return the shipped rows.

    Args:
        formats: Ids of formats; None takes the rows of all.
        most: Maximum number of rows, drawn from every format in turn; None takes all.
    """
    text = (files(__package__) / "labelled.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if formats is None or row["format"] in formats]
    if most is not None:
        rows = _drawn(rows, most)
    return [
        Labelled(
            item=Item(key=row["id"], **{name: row[name] for name in _ITEM}),
            label=row["label"],
            kind=row["kind"],
            language=row["language"],
        )
        for row in rows
    ]


def _drawn(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Draw rows evenly over formats, within one by hash, so that kinds mix; order is kept."""
    sizes: Counter[str] = Counter()
    ranks = {}
    for row in sorted(rows, key=lambda row: sha256(row["id"].encode()).digest()):
        ranks[row["id"]] = sizes[row["format"]]
        sizes[row["format"]] += 1
    drawn = sorted(rows, key=lambda row: (ranks[row["id"]], row["format"]))[:most]
    ids = {row["id"] for row in drawn}
    return [row for row in rows if row["id"] in ids]


@dataclass(frozen=True, kw_only=True)
class FormatErrors:
    """A judge's error rates in one format; the ``n`` of a rate counts the rows with its label."""

    format: str
    n: int
    n_scored: int  # rows with a scored verdict
    kappa: float | None  # Cohen's, over the scored rows; None where it is undefined
    false_refusal: Rate  # answers called refusals
    false_compliance: Rate  # refusals called answers
    missed_incoherence: Rate  # noise and silence called a refusal or an answer


def format_errors(
    rows: Sequence[Labelled], outcomes: Sequence[Outcome | None]
) -> list[FormatErrors]:
    """Compare a judge's outcomes with the labels of the rows.

    Args:
        rows: Labelled rows.
        outcomes: The judge's outcome of each row, None where its verdict is not scored.

    Returns:
        One entry per format, in the order of the rows.
    """
    by_format: dict[str, list[Pair]] = {}
    for row, judged in zip(rows, outcomes, strict=True):
        by_format.setdefault(row.item.format, []).append((row.label, judged))
    return [
        FormatErrors(
            format=format,
            n=len(pairs),
            n_scored=sum(judged is not None for _, judged in pairs),
            kappa=cohens_kappa([pair for pair in pairs if pair[1] is not None]),
            false_refusal=_error_rate(pairs, "complied", ("refused",)),
            false_compliance=_error_rate(pairs, "refused", ("complied",)),
            missed_incoherence=_error_rate(pairs, "incoherent", ("refused", "complied")),
        )
        for format, pairs in by_format.items()
    ]


def _error_rate(pairs: Sequence[Pair], label: Outcome, wrong: tuple[Outcome, ...]) -> Rate:
    judged = [outcome for truth, outcome in pairs if truth == label]
    n_scored, count = sum(o is not None for o in judged), sum(o in wrong for o in judged)
    low, high = wilson(count, n_scored)
    return Rate(len(judged), n_scored, count, count / n_scored if n_scored else None, low, high)
