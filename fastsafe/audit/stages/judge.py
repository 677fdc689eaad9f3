"""The stages that read answers: filters, judges, guards and metrics. Nothing is generated here."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from fastsafe.audit.plan.conditions import Condition
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.store.rows import AnsweredRow, CompletionRow, GuardRow, JudgementRow, Target
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import StoreError
from fastsafe.progress import Progress, stage
from fastsafe.safety.guards import Finding, Guard
from fastsafe.safety.judge_calibration import labelled
from fastsafe.safety.judges import Item, Judge, judge_all
from fastsafe.safety.verdict import Verdict as Said

COMMIT_ROWS = 256
_KIND = {True: "harmful", False: "benign"}

T = TypeVar("T")


def filter_answers(plan: Plan, store: Store, progress: Progress) -> None:
    """Let another condition's answers through a guard, or a refusal in their place."""
    filtered = [c for c in plan.conditions if c.mitigation in plan.panel.filters]
    pending = [(c, row) for c in filtered for row in store.unfiltered(c.id)]
    with stage(progress, "filter", len(pending), "answers"):
        for batch in _batches(pending, COMMIT_ROWS):
            answers = [
                answer
                for condition in dict.fromkeys(c for c, _ in batch)
                for answer in _screened(
                    condition,
                    plan.panel.filters[condition.mitigation],
                    [row for c, row in batch if c is condition],
                )
            ]
            with store.transaction():
                store.add_completions(answers)
            progress.advance(len(batch))


def judge(panel: Panel, store: Store, progress: Progress) -> None:
    """Judge every answer that a judge has not judged yet; nothing is generated again."""
    for name, reader in panel.judges.items():
        rows = store.unjudged(reader.identity)
        if name in panel.harmful_only:
            rows = _harmful(rows)
        _judge(name, reader, rows, f"answers by {name}", store, progress)
    for name, wordings in panel.wordings.items():
        own = panel.judges[name].identity
        for wording, reader in wordings.items():
            if reader.identity == own:
                continue
            rows = _harmful(store.unjudged(reader.identity))
            _judge(name, reader, rows, f"answers by {name}, {wording}", store, progress)


def calibrate(panel: Panel, formats: Sequence[str], store: Store, progress: Progress) -> None:
    """Have judges read rows whose outcome is known, those that they have not read yet.

    After all answers, so that a budget goes to them first.
    """
    for name, most in panel.calibrated.items():
        reader = panel.judges[name]
        known = store.calibrated(reader.identity)
        items = {row.key: row.item for row in labelled(formats, most) if row.key not in known}
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
    what: str,
    store: Store,
    progress: Progress,
) -> None:
    identity = reader.identity
    with stage(progress, "judge", len(rows), what):
        for batch in _batches(rows, COMMIT_ROWS):
            # a model that gave no finite logits: no verdict on it is invented
            failed = [row for row in batch if row.finish_reason == "error"]
            read = [row for row in batch if row.finish_reason != "error"]
            verdicts = [
                JudgementRow(row.key, name, identity, "not_judged", "generation failed", None)
                for row in failed
            ]
            for row, found in zip(read, judge_all(reader, [_item(r) for r in read]), strict=True):
                # nobody answered: left for the next run, and out of the coverage till then
                if found.verdict is not Said.JUDGE_ERROR:
                    said = found.verdict.value, found.raw, found.score, found.coherent
                    verdicts.append(JudgementRow(row.key, name, identity, *said))
            with store.transaction():
                store.add_judgements(verdicts)
            progress.advance(len(batch))


def guard(panel: Panel, store: Store, progress: Progress) -> None:
    """Have every guard read every prompt, and every answer, that it has not read yet."""
    targets: tuple[Target, ...] = ("prompt", "answer")
    for name, reader in panel.guards.items():
        identity = reader.identity
        pending = [(t, row) for t in targets for row in store.unguarded(t, identity)]
        with stage(progress, "guard", len(pending), f"prompts and answers by {name}"):
            for batch in _batches(pending, COMMIT_ROWS):
                items = [_item(row, f"{t}:{row.key}", is_prompt=t == "prompt") for t, row in batch]
                # nobody answered: left for the next run, and out of the coverage till then
                found = [
                    GuardRow(row.key, target, identity, _word(said), said.raw, said.p_unsafe)
                    for (target, row), said in zip(batch, reader.check(items), strict=True)
                    if not said.is_failure
                ]
                with store.transaction():
                    store.add_guarded(found)
                progress.advance(len(batch))


def measure(plan: Plan, store: Store, progress: Progress) -> None:
    """Score every utility row that has an answer and no value yet."""
    from fastsafe.safety.tasks import tasks

    known = tasks()
    pending = [
        (known[name], row)
        for name in plan.recipe.tasks
        for row in store.unmeasured(name, known[name].metric)
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
    condition: Condition, reader: Guard, rows: Sequence[AnsweredRow]
) -> list[CompletionRow]:
    """Answers of one condition as its guard lets them through.

    Rows that the guard could not be asked about are left for the next run: a guard that is down
    must not look like one that refuses.
    """
    from fastsafe.safety.defences import defences

    silent: set[tuple[str, str | None]] = set()

    def odds(pairs: Sequence[tuple[str, str | None]]) -> list[float | None]:
        found = reader.check(
            [
                Item(key=str(i), prompt=prompt, completion=answer, harmful=True)
                for i, (prompt, answer) in enumerate(pairs)
            ]
        )
        silent.update(pairs[i] for i, said in enumerate(found) if said.is_failure)
        # a guard without odds is certain of what it says
        return [
            said.p_unsafe
            if said.unsafe is None or said.p_unsafe is not None
            else float(said.unsafe)
            for said in found
        ]

    defence = defences()["guard_filter"]
    arguments = condition.served[1] | {"guard": odds}
    texts = [row.prompt for row in rows], [row.text for row in rows]
    return [
        CompletionRow(row.key, said.answer, (), _ended(row, said.outcome))
        for row, said in zip(rows, defence.apply(*texts, **arguments), strict=True)
        if silent.isdisjoint({(row.prompt, None), (row.prompt, row.text)})
    ]


def _ended(row: AnsweredRow, outcome: str) -> str:
    """How a filtered answer ended: as the model ended it, or by the guard."""
    return row.finish_reason if outcome == "passed" or row.finish_reason == "error" else outcome


def _item(row: AnsweredRow, key: str = "", *, is_prompt: bool = False) -> Item:
    return Item(
        key=key or row.key,
        prompt=row.prompt,
        completion=None if is_prompt else row.text,
        harmful=row.kind == "harmful",
        format=row.part,
    )


def _word(said: Finding) -> str:
    return "unreadable" if said.unsafe is None else "unsafe" if said.unsafe else "safe"


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]
