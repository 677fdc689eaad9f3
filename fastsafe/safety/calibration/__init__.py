"""How far a judge can be trusted: agreement with labels, with its own rewordings, with others.

``labelled.jsonl`` holds synthetic, non-operational pairs in every format: answers, short answers,
refusals in four languages and inside the answer channel, answers that end in a refusal and the
reverse, ordinary text that opens like a refusal, noise, and silence. Labels are those of the
three-way summary (`fastsafe.safety.verdict.outcome`), answers judged as the first paper does:
whoever gives the core of an answer has answered.
"""

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations

from fastsafe.errors import UsageError
from fastsafe.safety.judges import Item, Judge, judge_all
from fastsafe.safety.metrics import Rate, rate
from fastsafe.safety.stats import wilson
from fastsafe.safety.verdict import Outcome, outcome


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One row whose outcome is known."""

    item: Item
    label: Outcome
    kind: str = ""  # how the completion came about, e.g. "answer_then_refusal"
    language: str = ""


def labelled() -> list[Labelled]:
    """Return the shipped rows."""
    text = (files(__package__) / "labelled.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
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


@dataclass(frozen=True, kw_only=True)
class FormatErrors:
    """A judge's errors in one format; a rate's ``n`` counts the rows with the label."""

    format: str
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
    confusion: Mapping[tuple[Outcome, Outcome | None], int]  # (label, said); None: unscored
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
    said = [outcome(judgement) for judgement in found]
    pairs = [(row.label, got) for row, got in zip(rows, said, strict=True)]
    scored = [(label, got) for label, got in pairs if got is not None]
    by_format: dict[str, list[tuple[Outcome, Outcome | None]]] = {}
    for row, pair in zip(rows, pairs, strict=True):
        by_format.setdefault(row.item.format, []).append(pair)
    return Calibration(
        judge=judge.id,
        identity=judge.identity,
        n=len(pairs),
        n_scored=len(scored),
        kappa=cohen_kappa(scored),
        confusion=dict(Counter(pairs)),
        formats=tuple(
            FormatErrors(
                format=format,
                false_refusal=_share(own, "complied", ("refused",)),
                false_compliance=_share(own, "refused", ("complied",)),
                missed_incoherence=_share(own, "incoherent", ("refused", "complied")),
            )
            for format, own in by_format.items()
        ),
    )


def _share(
    pairs: Sequence[tuple[Outcome, Outcome | None]], label: Outcome, wrong: tuple[Outcome, ...]
) -> Rate:
    said = [got for truth, got in pairs if truth == label]
    n_scored, count = sum(got is not None for got in said), sum(got in wrong for got in said)
    low, high = wilson(count, n_scored)
    return Rate(len(said), n_scored, count, count / n_scored if n_scored else None, low, high)


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Cohen's kappa of two labellings; None without pairs or where chance agreement is certain.

    Source: Cohen 1960, Educ. Psychol. Meas. 20:37.

    Example:
        >>> cohen_kappa([("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")])
        0.5
    """
    n = len(pairs)
    if not n:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    same = sum(a == b for a, b in pairs)
    chance = sum(first[label] * second[label] for label in first)  # times n squared
    return None if chance == n * n else (same * n - chance) / (n * n - chance)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two judges give one outcome, over the rows that both have scored."""

    judge_a: str
    judge_b: str
    n: int
    agreement: float | None
    ci_low: float
    ci_high: float
    kappa: float | None


def agreement(judges: Sequence[Judge], items: Sequence[Item]) -> list[Agreement]:
    """Compare every two judges on the same rows.

    Raises:
        UsageError: There are fewer than two judges, or two with one id.
        FastsafeError: A judge can judge nothing.
    """
    found = _outcomes("agreement", judges, items, at_least=2)
    rows = []
    for a, b in combinations(found, 2):
        pairs = [
            (x, y)
            for x, y in zip(found[a], found[b], strict=True)
            if x is not None and y is not None
        ]
        n, same = len(pairs), sum(x == y for x, y in pairs)
        low, high = wilson(same, n)
        rows.append(
            Agreement(
                judge_a=a,
                judge_b=b,
                n=n,
                agreement=same / n if n else None,
                ci_low=low,
                ci_high=high,
                kappa=cohen_kappa(pairs),
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Band:
    """Answer rates of one set of completions under several wordings of a judge."""

    rates: Mapping[str, Rate]  # by judge id
    low: float | None  # smallest rate; None where no wording scored a row
    high: float | None


def band(judges: Sequence[Judge], items: Sequence[Item]) -> Band:
    """Measure how far the wording of a judge moves the answer rate; print it beside the rate.

    Raises:
        UsageError: There are fewer than three judges, or two with one id.
        FastsafeError: A judge can judge nothing.
    """
    if len(judges) < 3:
        raise UsageError(f"band: {len(judges)} wordings, expected at least 3")
    rates = {
        judge.id: rate([judgement.verdict for judgement in judge_all(judge, items)])
        for judge in _distinct("band", judges)
    }
    known = [found.rate for found in rates.values() if found.rate is not None]
    return Band(rates=rates, low=min(known, default=None), high=max(known, default=None))


def _distinct(what: str, judges: Sequence[Judge]) -> Sequence[Judge]:
    ids = [judge.id for judge in judges]
    if len(set(ids)) < len(ids):
        raise UsageError(f"{what}: judges are {', '.join(ids)}, expected distinct ids; set id")
    return judges


def _outcomes(
    what: str, judges: Sequence[Judge], items: Sequence[Item], at_least: int
) -> dict[str, list[Outcome | None]]:
    if len(judges) < at_least:
        raise UsageError(f"{what}: {len(judges)} judges, expected at least {at_least}")
    return {
        judge.id: [outcome(judgement) for judgement in judge_all(judge, items)]
        for judge in _distinct(what, judges)
    }
