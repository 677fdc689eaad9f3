"""Filter, judge, guard and measure answers that the store holds; nothing is generated here."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fastsafe.audit import unanswered
from fastsafe.audit.plan.conditions import BASE, Condition
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.results.schema.instruments import ReadBy, UnansweredResult
from fastsafe.audit.store.rows import AnsweredRow, CompletionRow, GuardRow, JudgementRow, Target
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import JudgeError, StoreError
from fastsafe.progress import Progress, stage
from fastsafe.safety.guards import Finding, Guard
from fastsafe.safety.judge_calibration import labelled
from fastsafe.safety.judges import Item, Judge, judge_all
from fastsafe.safety.verdict import Verdict

COMMIT_ROWS = 256
_KIND = {True: "harmful", False: "benign"}

T = TypeVar("T")


def filter_answers(plan: Plan, store: Store, progress: Progress) -> None:
    """Store the parent's answers as its guard lets them through, or a refusal in their place."""
    filtered = [c for c in plan.conditions if c.mitigation in plan.panel.filters]
    pending = [(c, row) for c in filtered for row in store.unfiltered(c.id)]
    causes: dict[str, list[str]] = {c.mitigation: [] for c in filtered}
    with stage(progress, "filter", len(pending), "answers"):
        for batch in _batches(pending, COMMIT_ROWS):
            answers = [
                answer
                for condition in dict.fromkeys(c for c, _ in batch)
                for answer in _screened(
                    condition,
                    plan.panel.filters[condition.mitigation],
                    [row for c, row in batch if c is condition],
                    causes[condition.mitigation],
                )
            ]
            with store.transaction():
                store.add_completions(answers)
            progress.advance(len(answers))
    asked = Counter(condition.mitigation for condition, _ in pending)
    notes = [
        note
        for label, reader in plan.panel.filters.items()
        for note in unanswered.of("filter", label, reader, asked[label], causes.get(label, ()))
    ]
    _note(store, progress, "filter", notes)


def judge(panel: Panel, store: Store, progress: Progress) -> None:
    """Judge every answer that has no verdict of a judge yet."""
    notes: list[UnansweredResult] = []
    for name, reader in panel.judges.items():
        rows = store.unjudged(reader.identity)
        if name in panel.harmful_only:
            rows = _harmful(rows)
        notes += _judge(name, reader, rows, f"answers by {name}", store, progress)
    for name, wordings in panel.wordings.items():
        default = panel.judges[name].identity
        for wording, reader in wordings.items():
            if reader.identity == default:
                continue
            rows = _harmful(store.unjudged(reader.identity))
            notes += _judge(name, reader, rows, f"answers by {name}, {wording}", store, progress)
    _note(store, progress, "judge", notes)


def calibrate(panel: Panel, formats: Sequence[str], store: Store, progress: Progress) -> None:
    """Judge labelled rows, to measure the judges; last, so that a budget goes to answers first."""
    for name, limit in panel.calibrated.items():
        reader = panel.judges[name]
        judged = store.calibrated(reader.identity)
        items = {row.key: row.item for row in labelled(formats, limit) if row.key not in judged}
        rows = [
            AnsweredRow(key, _KIND[i.harmful], i.format, i.prompt, i.completion or "", "stop", None)
            for key, i in items.items()
        ]
        if name in panel.harmful_only:
            rows = _harmful(rows)
        _judge(name, reader, rows, f"labelled rows by {name}", store, progress)


def _harmful(rows: Sequence[AnsweredRow]) -> list[AnsweredRow]:
    return [row for row in rows if row.kind == "harmful"]


def _judge(
    name: str,
    reader: Judge,
    rows: Sequence[AnsweredRow],
    unit: str,
    store: Store,
    progress: Progress,
) -> list[UnansweredResult]:
    identity, causes = reader.identity, []
    with _named(f"judge {name}"), stage(progress, "judge", len(rows), unit):
        for batch in _batches(rows, COMMIT_ROWS):
            # the model had no finite logits: there is no answer to judge
            failed = [row for row in batch if row.finish_reason == "error"]
            read = [row for row in batch if row.finish_reason != "error"]
            verdicts = [
                JudgementRow(row.key, name, identity, "not_judged", "generation failed", None)
                for row in failed
            ]
            judgements = judge_all(reader, [_item(row) for row in read])
            for row, judgement in zip(read, judgements, strict=True):
                # a judge that did not reply is asked again by the next run
                if judgement.verdict is Verdict.JUDGE_ERROR:
                    causes.append(judgement.raw)
                else:
                    verdicts.append(
                        JudgementRow(
                            row.key,
                            name,
                            identity,
                            judgement.verdict.value,
                            judgement.raw,
                            judgement.score,
                            judgement.coherent,
                        )
                    )
            with store.transaction():
                store.add_judgements(verdicts)
            progress.advance(len(verdicts))
    return unanswered.of("judge", name, reader, len(rows), causes)


def warn_of_cut_thoughts(panel: Panel, store: Store, progress: Progress) -> None:
    """Say how many probes were answered by a thought that never ended, and what to change."""
    probes = store.verdicts(next(iter(panel.judges.values())).identity)
    cut = [row.condition for row in probes if row.verdict == Verdict.TRUNCATED]
    if cut:
        num_base = sum(row.condition == BASE for row in probes)
        progress.say(
            f"{len(cut)} of {len(probes)} probes, {cut.count(BASE)} of {num_base} of the base, got "
            "a thought that was cut before any answer: raise sampling.max_tokens (and "
            "early_stop.tokens), or switch thinking off by chat_template_kwargs, for Qwen3 "
            "{enable_thinking: false}"
        )


def guard(panel: Panel, store: Store, progress: Progress) -> None:
    """Store every guard's verdict on prompts and answers that have none yet."""
    targets: tuple[Target, ...] = ("prompt", "answer")
    notes: list[UnansweredResult] = []
    for name, reader in panel.guards.items():
        identity, causes = reader.identity, []
        pending = [(t, row) for t in targets for row in store.unguarded(t, identity)]
        unit = f"prompts and answers by {name}"
        with _named(f"guard {name}"), stage(progress, "guard", len(pending), unit):
            for batch in _batches(pending, COMMIT_ROWS):
                items = [_item(row, f"{t}:{row.key}", is_prompt=t == "prompt") for t, row in batch]
                findings = reader.check(items)
                # a guard that did not reply is asked again by the next run
                causes += [finding.raw for finding in findings if finding.is_failure]
                verdicts = [
                    GuardRow(
                        row.key, target, identity, _word(finding), finding.raw, finding.p_unsafe
                    )
                    for (target, row), finding in zip(batch, findings, strict=True)
                    if not finding.is_failure
                ]
                with store.transaction():
                    store.add_guarded(verdicts)
                progress.advance(len(verdicts))
        notes += unanswered.of("guard", name, reader, len(pending), causes)
    _note(store, progress, "guard", notes)


@contextmanager
def _named(reader: str) -> Iterator[None]:
    """Name the judge or guard that can answer no row at all, and say what to do then."""
    try:
        yield
    except JudgeError as error:
        raise JudgeError(f"{reader}: {error}; then run the same command again") from error


def _note(
    store: Store, progress: Progress, read_by: ReadBy, notes: Sequence[UnansweredResult]
) -> None:
    """Say which judges or guards did not answer, and keep it for the reports."""
    for note in notes:
        progress.say(unanswered.sentence(note))
    unanswered.keep(store, read_by, notes)


def measure(plan: Plan, store: Store, progress: Progress) -> None:
    """Score every utility row that has an answer and no value yet."""
    from fastsafe.safety.tasks import tasks

    registry = tasks()
    pending = [
        (registry[name], row)
        for name in plan.recipe.tasks
        for row in store.unmeasured(name, registry[name].metric)
    ]
    with stage(progress, "measure", len(pending), "utility rows"):
        for batch in _batches(pending, COMMIT_ROWS):
            values = []
            for task, row in batch:
                if row.reference is None:
                    raise StoreError(f"store {store.path}: row {row.key} has no reference answer")
                values.append((row.key, task.metric, task.score(row.text, row.reference)))
            with store.transaction():
                store.add_utility(values)
            progress.advance(len(batch))


def _screened(
    condition: Condition, reader: Guard, rows: Sequence[AnsweredRow], causes: list[str]
) -> list[CompletionRow]:
    """Return one condition's answers, filtered by its guard.

    Rows without a reply of the guard are left for the next run, and the cause of each is appended
    to ``causes``: a guard that is down must not look like one that refuses.
    """
    from fastsafe.safety.defences import defences

    failed: dict[tuple[str, str | None], str] = {}

    def odds(pairs: Sequence[tuple[str, str | None]]) -> list[float | None]:
        items = [
            Item(key=str(i), prompt=prompt, completion=answer, harmful=True)
            for i, (prompt, answer) in enumerate(pairs)
        ]
        with _named(f"guard of mitigation {condition.mitigation}"):
            findings = reader.check(items)
        replies = zip(pairs, findings, strict=True)
        failed.update({pair: finding.raw for pair, finding in replies if finding.is_failure})
        # a verdict without odds counts as certain
        return [
            finding.p_unsafe
            if finding.unsafe is None or finding.p_unsafe is not None
            else float(finding.unsafe)
            for finding in findings
        ]

    defence = defences()["guard_filter"]
    arguments = condition.served[1] | {"guard": odds}
    texts = [row.prompt for row in rows], [row.text for row in rows]
    answers = []
    for row, screened in zip(rows, defence.apply(*texts, **arguments), strict=True):
        cause = failed.get((row.prompt, None), failed.get((row.prompt, row.text)))
        if cause is None:
            reason = _finish_reason(row, screened.outcome)
            answers.append(CompletionRow(row.key, screened.answer, (), reason))
        else:
            causes.append(cause)
    return answers


def _finish_reason(row: AnsweredRow, outcome: str) -> str:
    """Return the model's finish reason, or the guard's outcome where it replaced the answer."""
    return row.finish_reason if outcome == "passed" or row.finish_reason == "error" else outcome


def _item(row: AnsweredRow, key: str = "", *, is_prompt: bool = False) -> Item:
    return Item(
        key=key or row.key,
        prompt=row.prompt,
        completion=None if is_prompt else row.text,
        harmful=row.kind == "harmful",
        format=row.part,
    )


def _word(finding: Finding) -> str:
    return "unreadable" if finding.unsafe is None else "unsafe" if finding.unsafe else "safe"


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]
