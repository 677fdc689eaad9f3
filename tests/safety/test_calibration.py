"""The labelled set, and what is measured with it."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.errors import UsageError
from fastsafe.safety.calibration import (
    Labelled,
    agreement,
    band,
    calibrate,
    cohen_kappa,
    labelled,
)
from fastsafe.safety.formats import formats
from fastsafe.safety.judges import Item, families, judges
from fastsafe.safety.judges._model import ModelJudge
from fastsafe.safety.stats import wilson

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
    """What the screen cannot see stays unseen: indirect refusals, and answers after a refusal."""
    found = calibrate(REFUSAL)
    assert found.n == found.n_scored == len(labelled())
    assert found.kappa == pytest.approx(0.869, abs=0.001)
    assert sum(found.confusion.values()) == found.n
    assert [row.format for row in found.formats] == list(formats())
    for row in found.formats:
        assert row.false_compliance.count == 1  # the indirect refusal
        assert row.false_refusal.count == 1  # the answer behind a refusal
        assert row.missed_incoherence.count == 0
        n = row.false_refusal.n_scored
        assert (row.false_refusal.ci_low, row.false_refusal.ci_high) == wilson(1, n)


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
    found = calibrate(paper1(scripted(lambda ask: said.get(ask.key, "?"))), rows)
    assert (found.n, found.n_scored) == (5, 4)
    assert found.confusion["refused", None] == 1
    (row,) = found.formats
    assert (row.false_refusal.count, row.false_refusal.n_scored) == (1, 2)
    assert (row.false_compliance.n, row.false_compliance.n_scored) == (2, 1)
    assert row.missed_incoherence.rate == 0.0


def test_kappa_against_its_definition() -> None:
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")] * 3) is None
    assert cohen_kappa([("a", "a"), ("b", "b")]) == 1.0
    assert cohen_kappa([("a", "b"), ("b", "a")]) == -1.0
    # the textbook table: 20 and 15 on the diagonal, 5 and 10 beside it
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(table) == pytest.approx(0.4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=30))
def test_kappa_is_symmetric_and_at_most_one(pairs: list[tuple[str, str]]) -> None:
    found = cohen_kappa(pairs)
    assert found == cohen_kappa([(b, a) for a, b in pairs])
    assert found is None or found <= 1
    if found == 1:
        assert all(a == b for a, b in pairs)


def test_agreement_counts_what_both_have_scored(scripted: Any) -> None:
    items = [row.item for row in answers("complied", "complied", "refused", "refused")]
    said = {"0": "Final Verdict: 1", "1": "Final Verdict: -1", "2": "Final Verdict: -1"}
    rubric = paper1(scripted(lambda ask: said.get(ask.key, "?")))
    (found,) = agreement([REFUSAL, rubric], items)
    assert (found.judge_a, found.judge_b, found.n) == ("refusal", "rubric_paper1-ours", 3)
    assert found.agreement == pytest.approx(2 / 3)
    assert (found.ci_low, found.ci_high) == wilson(2, 3)
    assert found.kappa == pytest.approx(0.4)
    with pytest.raises(UsageError, match="1 judges, expected at least 2"):
        agreement([REFUSAL], items)
    with pytest.raises(UsageError, match="expected distinct ids"):
        agreement([REFUSAL, REFUSAL], items)


def test_a_band_over_wordings(scripted: Any) -> None:
    items = [row.item for row in answers(*["complied"] * 4)]
    strict = scripted(lambda ask: f"Final Verdict: {1 if ask.key == '0' else -1}")
    loose = scripted(lambda ask: "Final Verdict: 1")
    mute = scripted(lambda ask: "?")
    wordings = [paper1(strict), paper1(loose, "short"), paper1(mute, "steps")]
    found = band(wordings, items)
    assert (found.low, found.high) == (0.25, 1.0)
    assert found.rates["rubric_paper1-steps-ours"].n_scored == 0
    assert found.rates["rubric_paper1-ours"].count == 1
    assert band([paper1(mute, w) for w in ("full", "short", "steps")], items).low is None
    with pytest.raises(UsageError, match="2 wordings, expected at least 3"):
        band(wordings[:2], items)


def test_every_line_of_the_file_has_the_same_keys() -> None:
    from importlib.resources import files

    text = (files("fastsafe.safety.calibration") / "labelled.jsonl").read_text(encoding="utf-8")
    keys = {tuple(json.loads(line)) for line in text.splitlines()}
    assert keys == {
        ("id", "format", "kind", "language", "prompt", "completion", "harmful", "label")
    }
