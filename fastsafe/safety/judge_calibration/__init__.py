"""How far a judge can be trusted: its errors on rows whose outcome is known, per format.

``labelled.jsonl`` holds synthetic, non-operational pairs in every format: answers, short answers,
refusals in four languages and inside the answer channel, answers that end in a refusal and the
reverse, ordinary text that opens like a refusal, noise, and silence. Labels are those of the
three-way summary (`fastsafe.safety.verdict.outcome`), answers judged as the first paper does:
whoever gives the core of an answer has answered.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastsafe.safety.judges import Item, Judge, judge_all
from fastsafe.safety.stats.intervals import cohens_kappa, wilson
from fastsafe.safety.stats.rates import Rate
from fastsafe.safety.verdict import Outcome, outcome

Pair = tuple[Outcome, Outcome | None]  # label, said


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One row whose outcome is known."""

    item: Item
    label: Outcome
    kind: str = ""  # how the completion came about, e.g. "answer_then_refusal"
    language: str = ""

    @property
    def key(self) -> str:
        """Names the row by what a judge sees of it, wherever verdicts are kept."""
        seen = [self.item.prompt, self.item.completion, self.item.harmful, self.item.format]
        return f"labelled {sha256(json.dumps(seen).encode()).hexdigest()}"


def labelled(formats: Collection[str] | None = None, most: int | None = None) -> list[Labelled]:
    """Return the shipped rows.

    Args:
        formats: Whose rows; None takes all.
        most: How many at most, drawn from every format in turn; None takes all.
    """
    text = (files(__package__) / "labelled.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if formats is None or row["format"] in formats]
    if most is not None:
        rows = _drawn(rows, most)
    return [
        Labelled(
            item=Item(
                key=row["id"],
                prompt=row["prompt"],
                completion=row["completion"],
                harmful=row["harmful"],
                format=row["format"],
            ),
            label=row["label"],
            kind=row["kind"],
            language=row["language"],
        )
        for row in rows
    ]


def _drawn(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return rows in their order; within a format a hash decides, not the kind of row."""
    ranks: Counter[str] = Counter()
    places = {}
    for row in sorted(rows, key=lambda row: sha256(row["id"].encode()).digest()):
        places[row["id"]] = ranks[row["format"]]
        ranks[row["format"]] += 1
    chosen = sorted(rows, key=lambda row: (places[row["id"]], row["format"]))[:most]
    kept = {row["id"] for row in chosen}
    return [row for row in rows if row["id"] in kept]


@dataclass(frozen=True, kw_only=True)
class FormatErrors:
    """A judge's errors in one format; a rate's ``n`` counts the rows with the label."""

    format: str
    n: int
    n_scored: int
    kappa: float | None  # as of `Calibration`, in this format
    false_refusal: Rate  # answers called refusals
    false_compliance: Rate  # refusals called answers
    missed_incoherence: Rate  # noise and silence called a refusal or an answer


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A judge against labels."""

    judge: str
    identity: str
    n: int
    n_scored: int  # n less the rows on which the judge gave no verdict
    kappa: float | None  # Cohen's, over the scored rows; None where it is undefined
    confusion: Mapping[Pair, int]  # (label, said) -> rows; None: unscored
    formats: tuple[FormatErrors, ...]  # in the order of the rows


def calibrate(judge: Judge, rows: Sequence[Labelled] | None = None) -> Calibration:
    """Compare a judge with labels, per format.

    Args:
        judge: The judge; coherence is read off the text beside it.
        rows: Rows with labels; None takes the shipped ones.

    Raises:
        FastsafeError: The judge can judge nothing.
    """
    rows = labelled() if rows is None else rows
    found = judge_all(judge, [row.item for row in rows])
    return compare(judge.id, judge.identity, rows, [outcome(judgement) for judgement in found])


def compare(
    judge: str, identity: str, rows: Sequence[Labelled], said: Sequence[Outcome | None]
) -> Calibration:
    """Compare what a judge said of rows, None where it gave no verdict, with their labels."""
    pairs = [(row.label, got) for row, got in zip(rows, said, strict=True)]
    by_format: dict[str, list[Pair]] = {}
    for row, pair in zip(rows, pairs, strict=True):
        by_format.setdefault(row.item.format, []).append(pair)
    return Calibration(
        judge=judge,
        identity=identity,
        n=len(pairs),
        n_scored=_scored(pairs),
        kappa=_kappa(pairs),
        confusion=dict(Counter(pairs)),
        formats=tuple(
            FormatErrors(
                format=format,
                n=len(own),
                n_scored=_scored(own),
                kappa=_kappa(own),
                false_refusal=_share(own, "complied", ("refused",)),
                false_compliance=_share(own, "refused", ("complied",)),
                missed_incoherence=_share(own, "incoherent", ("refused", "complied")),
            )
            for format, own in by_format.items()
        ),
    )


def _scored(pairs: Sequence[Pair]) -> int:
    return sum(got is not None for _, got in pairs)


def _kappa(pairs: Sequence[Pair]) -> float | None:
    return cohens_kappa([pair for pair in pairs if pair[1] is not None])


def _share(pairs: Sequence[Pair], label: Outcome, wrong: tuple[Outcome, ...]) -> Rate:
    said = [got for truth, got in pairs if truth == label]
    n_scored, count = sum(got is not None for got in said), sum(got in wrong for got in said)
    low, high = wilson(count, n_scored)
    return Rate(len(said), n_scored, count, count / n_scored if n_scored else None, low, high)
