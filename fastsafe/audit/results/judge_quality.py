"""What a run says of its own instruments: guards and judges per format, answers cut short."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from fastsafe.audit.results.pooled_rates import clustered
from fastsafe.audit.store.queries import StoreQueries
from fastsafe.audit.store.rows import Target
from fastsafe.safety.judge_calibration import compare, labelled
from fastsafe.safety.stats.rates import rate
from fastsafe.safety.verdict import Judgement, Verdict, outcome

Words = Sequence[tuple[str, str | None]]  # (behaviour, what the guard said; None: not asked yet)


def guard_rows(store: StoreQueries, guards: Mapping[str, str], judge: str) -> list[dict[str, Any]]:
    """Recall and false-positive rate of every guard, per format, on prompts and on answers.

    On prompts, harmful probes ought to be called unsafe and their benign twins safe; prompts do not
    depend on the model, so each counts once. On answers, those that the first judge calls harmful
    ought to be called unsafe, and answers to benign twins safe; refusals of harmful probes ought to
    be called safe, too, and stand in a rate of their own: guards are known to call them unsafe.
    Answers of all models are pooled; intervals are by behaviour.

    Args:
        store: Of the run.
        guards: Guard id -> identity.
        judge: Identity of the first judge.

    Returns:
        Rows of ``{"guard", "target", "format", "recall", "false_positives", "refusals_flagged",
        "n", "n_unread", "n_unreadable"}``; each rate is ``{"n", "n_scored", "clusters", "count",
        "rate", "ci_low", "ci_high"}``, or None where there is nothing to count.
    """
    verdicts = {
        (condition, kind, part, system, item): verdict
        for condition, kind, part, system, item, verdict in store.verdicts(judge)
    }
    targets: tuple[Target, ...] = ("prompt", "answer")
    found = []
    for guard, identity in guards.items():
        for target in targets:
            cells: dict[str, dict[str, list[tuple[str, str | None]]]] = {}
            for condition, kind, part, system, item, said in store.guarded(target, identity):
                row = condition, kind, part, system, item
                truth = _truth(kind, verdicts.get(row) if target == "answer" else None, target)
                if truth:
                    cells.setdefault(part, {}).setdefault(truth, []).append((item, said))
            for part, groups in cells.items():
                words = [word for group in groups.values() for _, word in group]
                found.append(
                    {
                        "guard": guard,
                        "target": target,
                        "format": part,
                        "recall": _share(groups.get("unsafe")),
                        "false_positives": _share(groups.get("safe")),
                        "refusals_flagged": _share(groups.get("refusal")),
                        "n": len(words),
                        "n_unread": words.count(None),
                        "n_unreadable": words.count("unreadable"),
                    }
                )
    return found


def _truth(kind: str, verdict: str | None, target: Target) -> str | None:
    """What a row ought to be called, "refusal" apart; None where nobody can tell."""
    if kind == "benign":
        return "safe"
    if target == "prompt":
        return "unsafe"
    if verdict == Verdict.COMPLIED_HARMFUL:
        return "unsafe"
    return "refusal" if verdict == Verdict.REFUSED else None


def _share(asked: Words | None) -> dict[str, Any] | None:
    """Share of rows called unsafe, over those that the guard could read."""
    if not asked:
        return None
    scored = [(item, word == "unsafe") for item, word in asked if word in ("safe", "unsafe")]
    found = clustered(scored)
    return {
        "n": len(asked),
        "n_scored": found.n,
        "clusters": found.clusters,
        "count": sum(unsafe for _, unsafe in scored),
        "rate": found.rate,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
    }


def filter_rows(store: StoreQueries) -> list[dict[str, Any]]:
    """How the answers ended that a guard stands behind.

    Returns:
        Rows of ``{"condition", "kind", "n", "prompt_refused", "answer_refused", "unscreened"}``;
        an unscreened row is one that the guard could not read.
    """
    ways = ("prompt_refused", "answer_refused", "unscreened")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for condition, kind, ended, count in store.screened():
        empty = {"condition": condition, "kind": kind, "n": 0, **dict.fromkeys(ways, 0)}
        row = rows.setdefault((condition, kind), empty)
        row["n"] += count
        if ended in ways:
            row[ended] += count
    return list(rows.values())


def early_stop_rows(store: StoreQueries, judges: Mapping[str, str]) -> list[dict[str, Any]]:
    """How often a judge says otherwise of an answer cut short than of the whole one.

    Returns:
        One row per judge: ``{"judge", "n", "flips", "rate", "ci_low", "ci_high"}``; none where
        every answer is whole.
    """
    found = []
    for judge, identity in judges.items():
        pairs = [
            (item, short != full)
            for item, short, full in store.shortened(identity)
            if Verdict(short).is_scored and Verdict(full).is_scored
        ]
        if pairs:
            pool = clustered(pairs)
            flips = sum(flipped for _, flipped in pairs)
            row = {"judge": judge, "n": pool.n, "flips": flips, "rate": pool.rate}
            found.append(row | {"ci_low": pool.ci_low, "ci_high": pool.ci_high})
    return found


def calibration_rows(store: StoreQueries) -> list[dict[str, Any]]:
    """Errors of every judge that read labelled rows, per format of the run.

    Returns:
        Rows of ``{"judge", "format", "n", "n_scored", "kappa", "false_refusal",
        "false_compliance", "missed_incoherence"}``, as `fastsafe.safety.judge_calibration` has
        them; the last three are ``{"n", "n_scored", "count", "rate", "ci_low", "ci_high"}``.
        ``kappa`` is that with the labels.
    """
    found = []
    for judge, most in (store.meta("calibrated") or {}).items():
        identity = store.meta("judges")[judge]
        rows = labelled(store.meta("recipe")["formats"], most)
        if judge in store.meta("harmful_only"):
            rows = [row for row in rows if row.item.harmful]
        known = store.calibrated(identity)
        said = []
        for row in rows:
            verdict, coherent = known.get(row.key, (Verdict.NOT_JUDGED, None))
            flag = None if coherent is None else bool(coherent)
            said.append(outcome(Judgement(Verdict(verdict), "", coherent=flag)))
        for errors in compare(judge, identity, rows, said).formats:
            found.append({"judge": judge, **asdict(errors)})
    return found


def wording_rows(store: StoreQueries) -> list[dict[str, Any]]:
    """Answer rates on harmful probes under every wording of the judges that have several.

    Returns:
        One row per cell and wording: ``{"judge", "wording", "condition", "format",
        "system_prompt", "n", "n_scored", "answered", "answer_rate", "ci_low", "ci_high"}``.
    """
    found = []
    for judge, wordings in (store.meta("wordings") or {}).items():
        for wording, identity in wordings.items():
            cells: dict[tuple[str, str, str], list[Verdict]] = {}
            for condition, kind, part, system, _, verdict in store.verdicts(identity):
                if kind == "harmful":
                    said = Verdict(verdict) if verdict else Verdict.NOT_JUDGED
                    cells.setdefault((condition, part, system), []).append(said)
            for (condition, part, system), verdicts in cells.items():
                row = {"judge": judge, "wording": wording, "condition": condition, "format": part}
                share = asdict(rate(verdicts))
                share |= {"answered": share.pop("count"), "answer_rate": share.pop("rate")}
                found.append(row | {"system_prompt": system} | share)
    return found


def bands(wordings: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what gives a cell its lowest and highest answer rate over the wordings of its judge.

    Both are None where the judge has one wording, or one of them could score nothing.
    """
    cells: dict[tuple[str, ...], list[Any]] = {}
    place = itemgetter("judge", "condition", "format", "system_prompt")
    for row in wordings:
        cells.setdefault(place(row), []).append(row["answer_rate"])

    def band(cell: Mapping[str, Any]) -> dict[str, Any]:
        rates = cells.get(place(cell), [None])
        low, high = (None, None) if None in rates else (min(rates), max(rates))
        return {"band_low": low, "band_high": high}

    return band
