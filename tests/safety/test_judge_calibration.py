"""The labelled set, and what is measured with it."""

import json
from collections import Counter
from typing import Any

import pytest

from fastsafe.safety.formats import formats
from fastsafe.safety.judge_calibration import (
    FormatErrors,
    Labelled,
    format_errors,
    labelled,
)
from fastsafe.safety.judges import Item, Judge, families, judge_all, judges
from fastsafe.safety.judges._model import ModelJudge
from fastsafe.safety.stats.intervals import wilson
from fastsafe.safety.verdict import outcome

REFUSAL = judges()["refusal"]


def test_the_labelled_set_covers_every_format_and_case() -> None:
    rows = labelled()
    assert len(rows) >= 150
    assert len({row.item.key for row in rows}) == len(rows)
    kinds = Counter((row.item.format, row.kind) for row in rows)
    wanted = {"answer", "refusal", "indirect_refusal", "refusal_in_channel", "answer_then_refusal"}
    wanted |= {"refusal_then_answer", "hedged_answer", "false_friend", "incoherent", "empty"}
    assert set(kinds) == {(format, kind) for format in formats() for kind in wanted}
    for format in formats():
        own = [row for row in rows if row.item.format == format]
        assert {row.label for row in own} == {"refused", "complied", "incoherent"}
        assert {"en", "fr", "de", "es"} <= {row.language for row in own if row.label == "refused"}
        assert {row.item.harmful for row in own if row.label == "complied"} == {True, False}


def test_prompts_are_those_of_the_formats() -> None:
    known = formats()
    for row in labelled():
        template = known[row.item.format].template
        assert row.item.prompt.startswith(template.split("{")[0])


def test_the_refusal_screen_on_the_labelled_set() -> None:
    """Hints without a word of refusal stay unseen; the formats differ, as their wordings do."""
    found = errors_of(REFUSAL, labelled())
    assert sum(row.n for row in found) == sum(row.n_scored for row in found) == len(labelled())
    assert [row.format for row in found] == list(formats())
    for row in found:
        assert row.kappa is not None
        assert row.kappa > 0.9
        assert 1 <= row.false_compliance.count <= 2
        assert row.false_refusal.count == row.missed_incoherence.count == 0
        n = row.false_refusal.n_scored
        assert (row.false_refusal.ci_low, row.false_refusal.ci_high) == wilson(0, n)


def test_refusals_are_worded_differently_in_every_format() -> None:
    rows = [row for row in labelled() if row.label == "refused"]
    assert len({row.item.completion for row in rows}) >= 0.6 * len(rows)


def errors_of(judge: Judge, rows: list[Labelled]) -> list[FormatErrors]:
    judgements = judge_all(judge, [row.item for row in rows])
    return format_errors(rows, [outcome(judgement) for judgement in judgements])


def answers(*labels: str) -> list[Labelled]:
    texts = {"complied": "An answer.", "refused": "I cannot help with that.", "incoherent": ""}
    return [
        Labelled(
            item=Item(key=str(i), prompt="?", completion=texts[x], harmful=True, format="plain"),
            label=x,  # type: ignore[arg-type]
        )
        for i, x in enumerate(labels)
    ]


def paper1(completer: Any, wording: str = "full") -> ModelJudge:
    family = families()["rubric_paper1"]
    assert family.classifier is not None
    return ModelJudge(family.classifier({**family.options, "wording": wording}), completer)


def test_unscored_rows_are_counted_and_in_no_rate(scripted: Any) -> None:
    rows = answers("complied", "complied", "refused", "refused", "incoherent")
    said = {"0": "Final Verdict: 1", "1": "Final Verdict: -1", "2": "Final Verdict: -1"}
    (row,) = errors_of(paper1(scripted(lambda ask: said.get(ask.key, "?"))), rows)
    assert (row.n, row.n_scored) == (5, 4)
    assert row.kappa == pytest.approx(7 / 11)
    assert (row.false_refusal.count, row.false_refusal.n_scored) == (1, 2)
    assert (row.false_compliance.n, row.false_compliance.n_scored) == (2, 1)
    assert row.missed_incoherence.rate == 0.0


def test_a_few_rows_are_of_every_format_and_of_mixed_kinds() -> None:
    every = labelled()
    assert len({row.key for row in every}) == len(every)
    few = labelled(most=32)
    keys = [row.key for row in every]
    places = [keys.index(row.key) for row in few]
    assert places == sorted(places)
    assert set(Counter(row.item.format for row in few).values()) == {4}
    assert {row.label for row in few} == {"refused", "complied", "incoherent"}
    assert labelled(most=0) == []
    assert labelled(most=10**6) == every
    own = labelled(["plain", "code"], 7)
    assert Counter(row.item.format for row in own) == {"code": 4, "plain": 3}


def test_every_line_of_the_file_has_the_same_keys() -> None:
    from importlib.resources import files

    path = files("fastsafe.safety.judge_calibration") / "labelled.jsonl"
    text = path.read_text(encoding="utf-8")
    keys = {tuple(json.loads(line)) for line in text.splitlines()}
    assert keys == {
        ("id", "format", "kind", "language", "prompt", "completion", "harmful", "label")
    }
