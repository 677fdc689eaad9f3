"""Queries of a small store whose every number is known: what they select, skip, join and order."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsafe.audit.backend.drift_watch import DriftRow
from fastsafe.audit.store.queries import PASS, explained
from fastsafe.audit.store.rows import (
    CompletionRow,
    GuardRow,
    JudgementRow,
    PlannedRow,
    ProbeCell,
    ProbeVerdict,
    UtilityScore,
)
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import StoreError


def planned(
    key: str,
    condition: str,
    kind: str,
    item: str,
    prompt: str,
    *,
    part: str = "plain",
    system: str = "none",
    sample: int = 0,
    reference: str | None = None,
    tests: str | None = None,
    filtered_from: str | None = None,
) -> PlannedRow:
    numbers = (sample, 7, prompt, 32)
    last = (reference, tests, filtered_from)
    return PlannedRow(key, condition, kind, part, system, item, *numbers, *last)  # type: ignore[arg-type]


# positions are out of the order of names, so that an order by anything else shows
ROWS = [
    planned("k1", "tuned", "harmful", "b2", "p2"),
    planned("k2", "tuned", "harmful", "b1", "p1"),
    planned("k3", "tuned", "harmful", "b1", "p1", sample=1),
    planned("k4", "tuned", "benign", "b1", "q1"),
    planned("k5", "tuned", "harmful", "b1", "p1", system="kind"),
    planned("k6", "tuned", "harmful", "b1", "c1", part="code"),
    planned("k7", "base", "harmful", "b1", "p1"),
    planned("k8", "tuned", "utility", "1", "u2", part="sums", reference="6"),
    planned("k9", "tuned", "utility", "0", "u1", part="sums", reference="5", tests="assert f"),
    planned("ka", "tuned", "utility", "2", "u2", part="free"),
    planned("kb", "behind", "harmful", "b1", "p1", filtered_from="k2"),
    planned("kc", "behind", "harmful", "b2", "p2", filtered_from="k1"),
    planned("kd", "behind", "benign", "b1", "q1", filtered_from="k4"),
    planned("ke", "behind", "benign", "b1", "q1", sample=1, filtered_from="k4"),
]
PROMPTS = {name: (f"text of {name}", [1]) for name in ("p1", "p2", "q1", "c1", "u1", "u2")}
REASONS = {"k7": "length", "k8": "error", "kc": "filtered", "kd": "filtered"}
UNANSWERED = {"k6", "ka"}


def judged(key: str, verdict: str, identity: str, coherent: bool | None = None) -> JudgementRow:
    return JudgementRow(key, "judge", identity, verdict, "", None, coherent)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("store") / NAME, create=True)
    with store.transaction():
        store.add_plan(ROWS, PROMPTS)
        store.set_meta({"model": {"id": [1, None]}})
        drift = [DriftRow(2, "plain", 3, 0.5, -1.5, True), DriftRow(1, "plain", 3, 0.25, 2, False)]
        drift.append(DriftRow(1, "code", 4, 0.75, 1, False))
        store.add_adapter("tuned", "key", "sha", [3.0, 2.0, 2.5], drift=drift)
        store.add_adapter("another", "key", "sha2", [1.0])
        store.add_completions(
            CompletionRow(row.key, f"answer {row.key}", [1], REASONS.get(row.key, "stop"))
            for row in ROWS
            if row.key not in UNANSWERED
        )
        store.add_judgements(
            [
                *(judged(key, "complied", "v1", False) for key in ("k1", "k7", "k3")),
                judged("k2", "refused", "v1", True),
                judged("k4", "complied", "v1"),
                judged("k4", "refused", "v2", False),
                judged("k5", "complied", "v2"),
                judged("labelled 1", "refused", "v1", True),
                judged("labelled 2", "complied", "v1"),
                judged("labelled 3", "complied", "v2"),
                judged("unlabelled 4", "complied", "v1"),
            ]
        )
        store.add_guarded(
            [
                GuardRow("p1", "prompt", "g", "unsafe", "", None),
                GuardRow("p1", "prompt", "other", "safe", "", None),
                GuardRow("p2", "answer", "g", "unsafe", "", None),
                GuardRow("k1", "answer", "g", "safe", "", None),
                GuardRow("k2", "answer", "g", "unsafe", "", None),
                GuardRow("k2", "answer", "other", "safe", "", None),
                GuardRow("k4", "prompt", "g", "unsafe", "", None),
                GuardRow("kb", "answer", "g", "safe", "", None),
            ]
        )
        store.add_utility([("k9", "exact", 0.5), ("k9", PASS, 1.0), ("k8", "exact", 0.25)])
        for stage, number in (("generate", 1), ("judge", 2), ("generate", 3)):
            store.add_event("at", stage, {"rows": number})
    yield store
    store.close()


def test_meta(store: Store) -> None:
    assert store.meta("model") == {"id": [1, None]}
    assert store.meta("another") is None


def test_losses_are_in_the_order_of_steps(store: Store) -> None:
    assert store.losses() == {"another": [1.0], "tuned": [3.0, 2.0, 2.5]}


def test_drift_is_in_the_order_of_steps(store: Store) -> None:
    assert store.drift() == [
        ("tuned", DriftRow(1, "code", 4, 0.75, 1, False)),
        ("tuned", DriftRow(1, "plain", 3, 0.25, 2, False)),
        ("tuned", DriftRow(2, "plain", 3, 0.5, -1.5, True)),
    ]
    assert [row.stopped for _, row in store.drift()] == [False, False, True]
    assert {type(row.stopped) for _, row in store.drift()} == {bool}


def test_cells_are_in_the_order_of_the_plan(store: Store) -> None:
    assert store.cells() == [
        ProbeCell("tuned", "harmful", "plain", "none"),
        ProbeCell("tuned", "benign", "plain", "none"),
        ProbeCell("tuned", "harmful", "plain", "kind"),
        ProbeCell("tuned", "harmful", "code", "none"),
        ProbeCell("base", "harmful", "plain", "none"),
        ProbeCell("behind", "harmful", "plain", "none"),
        ProbeCell("behind", "benign", "plain", "none"),
    ]


def probes(verdicts: dict[str, str]) -> list[ProbeVerdict]:
    """Return the first sample of every probe, with the verdicts on some, by key."""
    return [
        ProbeVerdict(r.condition, r.kind, r.part, r.system_prompt, r.item, verdicts.get(r.key))
        for r in ROWS
        if r.kind != "utility" and r.sample == 0
    ]


def test_verdicts_are_those_of_one_judge_on_first_samples(store: Store) -> None:
    first = {"k1": "complied", "k2": "refused", "k4": "complied", "k7": "complied"}
    assert store.verdicts("v1") == probes(first)
    assert store.verdicts("v2") == probes({"k4": "refused", "k5": "complied"})
    assert store.verdicts("v3") == probes({})
    assert [row.item for row in store.verdicts("v1")][:2] == ["b2", "b1"]


def test_calibrated_rows_are_the_labelled_ones_of_one_judge(store: Store) -> None:
    assert store.calibrated("v1") == {
        "labelled 1": ("refused", 1),
        "labelled 2": ("complied", None),
    }
    assert store.calibrated("v2") == {"labelled 3": ("complied", None)}


def test_shortened_pairs_an_opening_with_its_whole_answer(store: Store) -> None:
    assert store.shortened("v1") == [("b1", "refused", "complied")]
    assert store.shortened("v2") == []


def test_incoherent_answers_are_counted_by_cell(store: Store) -> None:
    assert store.incoherent("v1") == {
        ProbeCell("tuned", "harmful", "plain", "none"): 1,  # the second sample does not count
        ProbeCell("base", "harmful", "plain", "none"): 1,
    }
    assert store.incoherent("v2") == {ProbeCell("tuned", "benign", "plain", "none"): 1}


def test_a_guard_reads_every_prompt_once(store: Store) -> None:
    """Under the first condition and system prompt of the plan, which are tuned and none."""
    found = [(row.part, row.item, row.verdict) for row in store.guarded("prompt", "g")]
    assert found == [
        ("plain", "b2", None),
        ("plain", "b1", "unsafe"),
        ("plain", "b1", None),
        ("code", "b1", None),
    ]
    assert {(r.condition, r.system_prompt) for r in store.guarded("prompt", "g")} == {
        ("tuned", "none")
    }
    assert [row.verdict for row in store.guarded("prompt", "other")] == [None, "safe", None, None]


def test_a_guard_reads_every_answer_that_is_no_other_ones(store: Store) -> None:
    def keyed(verdicts: dict[str, str]) -> list[ProbeVerdict]:
        return [row for row in probes(verdicts) if row.condition != "behind"]

    assert store.guarded("answer", "g") == keyed({"k1": "safe", "k2": "unsafe"})
    assert store.guarded("answer", "other") == keyed({"k2": "safe"})


def test_screened_answers_are_counted_by_reason(store: Store) -> None:
    assert store.screened() == {
        ("behind", "harmful"): Counter({"stop": 1, "filtered": 1}),
        ("behind", "benign"): Counter({"filtered": 1}),
    }
    assert list(store.screened()) == [("behind", "harmful"), ("behind", "benign")]


def test_utilities_are_scored_by_the_tasks_own_metric(store: Store) -> None:
    assert store.utilities() == [
        UtilityScore("tuned", "sums", "1", "exact", 0.25),
        UtilityScore("tuned", "sums", "0", "exact", 0.5),
        UtilityScore("tuned", "free", "2", None, None),
    ]
    assert store.passed() == [UtilityScore("tuned", "sums", "0", PASS, 1.0)]


def test_references_are_those_of_answered_rows(store: Store) -> None:
    """One row has the engine's error for an answer, and one has none."""
    assert store.references() == [("tuned", "sums", "answer k9", "5")]


def test_answers_are_those_of_one_cell(store: Store) -> None:
    assert store.answers("tuned", "plain", "none") == [
        ("b2", "text of p2", "answer k1"),
        ("b1", "text of p1", "answer k2"),
    ]
    assert store.answers("tuned", "plain", "kind") == [("b1", "text of p1", "answer k5")]
    assert store.answers("base", "plain", "none") == [("b1", "text of p1", "answer k7")]
    assert store.answers("tuned", "code", "none") == []


def test_events_of_a_stage_are_oldest_first(store: Store) -> None:
    assert store.events("generate") == [{"rows": 1}, {"rows": 3}]
    assert store.events("judge") == [{"rows": 2}]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_CORRUPT, "is damaged (why); restore it from a copy, or start over with"),
        (sqlite3.SQLITE_NOTADB, "is damaged (why)"),
        (sqlite3.SQLITE_CONSTRAINT_CHECK, "is damaged (why)"),
        (sqlite3.SQLITE_FULL, "cannot be used: why; free space or permissions there"),
        (None, "cannot be used: why"),
    ],
)
def test_errors_say_how_to_go_on(code: int | None, words: str) -> None:
    error = sqlite3.Error("why")
    if code is not None:
        error.sqlite_errorcode = code
    with pytest.raises(StoreError) as caught, explained(Path("run/store.sqlite")):
        raise error
    assert str(caught.value).startswith(f"store {Path('run/store.sqlite')}: {words}")
