"""Lint finds what was planted, all of it where a rule says so, and nothing in clean sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour
from fastsafe.safety.lint import Declared, Kind, LintFinding, Report, lint
from fastsafe.safety.mixing.safety_rows import refusals, safety_rows_from
from fastsafe_testing.placeholder_sets import (
    NUM_DUPLICATES,
    NUM_GROUPS,
    NUM_SHORTCUTS,
    phrase,
    published_defects,
    row,
    safety_row,
    user_row,
)

CLEAN: dict[Kind, list[dict[str, Any]]] = {
    "safety": [safety_row(i) for i in range(500)],
    "user": [user_row(i) for i in range(500)],
}
FEW = {kind: rows[:40] for kind, rows in CLEAN.items()}


def found(report: Report) -> set[tuple[str, int]]:
    return {(each.rule, each.row) for each in report.findings}


def planted(kind: Kind, bad: dict[str, Any], at: int = 7, **options: Any) -> LintFinding | None:
    """Only finding after one row of a clean set was replaced."""
    rows = list(FEW[kind])
    rows[at] = bad
    findings = lint(rows, kind=kind, **options).findings
    assert len(findings) <= 1
    assert not findings or findings[0].row == at
    return findings[0] if findings else None


@pytest.mark.parametrize("kind", ["safety", "user"])
def test_no_false_alarm_on_clean_sets(kind: Kind) -> None:
    probes = [phrase(i) for i in range(500, 700)]
    report = lint(CLEAN[kind], probes=probes, declared=Declared(language="en", licence="mit"))
    assert report.findings == ()
    assert report.num_safety == (500 if kind == "safety" else 0)


def test_the_defects_of_the_published_set_are_found_and_nothing_else() -> None:
    pairs, wanted = published_defects()
    report = lint([row(query, answer) for query, answer in pairs])
    groups = {each.detail.split(",")[0] for each in report.findings if each.rule == "duplicate"}
    shortcuts = [each for each in report.findings if each.rule == "balance"]
    assert len(wanted["duplicate"]) == NUM_DUPLICATES
    assert len(groups) == NUM_GROUPS
    assert [each.detail for each in shortcuts] == [
        f"a phrase of generators is in {NUM_SHORTCUTS:,} of 2,000 answers"
    ]
    expected = {(rule, i) for rule, rows in wanted.items() for i in rows}
    assert found(report) == expected | {("balance", shortcuts[0].row)}


@settings(max_examples=15)
@given(st.sampled_from(["safety", "user"]), st.data())
def test_planted_duplicates_are_all_found(kind: Kind, data: st.DataObject) -> None:
    rows = list(FEW[kind])
    places = data.draw(st.lists(st.integers(20, 39), unique=True, max_size=8))
    change = data.draw(st.sampled_from([str.upper, "  {} !".format, str.title]))
    for at in places:
        prompt = rows[at - 20]["messages"][0]["content"]
        rows[at] = row(change(prompt), rows[at]["messages"][1]["content"])
    assert found(lint(rows, kind=kind)) == {("duplicate", at) for at in places}


@settings(max_examples=25)
@given(st.integers(13, 60), st.data())
def test_one_changed_word_in_13_is_found(length: int, data: st.DataObject) -> None:
    words = [f"word{i}" for i in range(length)]
    changed = list(words)
    changed[data.draw(st.integers(0, length - 1))] = "other"
    one, two = row(" ".join(words), "yes it is"), row(" ".join(changed), "yes it was")
    rows = [*FEW["user"], one, two]
    assert found(lint(rows, kind="user")) == {("near_duplicate", 41)}


@settings(max_examples=10)
@given(st.integers(0, 39), st.sampled_from([" today", ", please!", " and now"]))
def test_an_added_word_is_found(at: int, more: str) -> None:
    prompt = FEW["user"][at]["messages"][0]["content"]
    rows = [*FEW["user"], row(prompt + more, "yes it is")]
    assert found(lint(rows, kind="user")) == {("near_duplicate", 40)}


def test_templates_are_no_near_duplicates() -> None:
    frame = "Read what follows with care and tell me in one sentence what {} and {} have in common"
    rows = [row(frame.format(f"a{i}", f"b{i}"), f"answer {i}") for i in range(200)]
    assert lint(rows, kind="user").findings == ()


def test_one_request_in_many_formats_is_no_near_duplicate() -> None:
    """Nor is a benign twin that says it is one, however alike its words."""
    behaviours = [Behaviour(str(i), phrase(i), f"{phrase(i)} again") for i in range(60)]
    formats = ["plain", "code", "classification", "summarization", "true_false"]
    twins = [Behaviour(each.behavior_id, each.benign, "") for each in behaviours]
    rows = safety_rows_from(behaviours, formats)
    for twin in safety_rows_from(twins, formats):
        answer = {"role": "assistant", "content": "It is easy."}
        rows.append({**twin, "messages": [twin["messages"][0], answer], "expected": "comply"})
    assert lint(rows).findings == ()
    unlabelled = [{"messages": each["messages"]} for each in rows if each["expected"] == "refuse"]
    assert lint(unlabelled).findings == ()


def test_a_duplicate_says_how_and_of_what() -> None:
    prompt = FEW["safety"][2]["messages"][0]["content"]
    same = planted("safety", row(prompt, "I can't."))
    assert same is not None
    assert same.detail == "same prompt as row 2, another answer"
    alike = planted("safety", row(prompt.upper(), FEW["safety"][2]["messages"][1]["content"]))
    assert alike is not None
    assert alike.detail.startswith(
        "same prompt but for case, punctuation or spacing as row 2, same"
    )


def test_another_system_text_makes_another_prompt() -> None:
    turns = FEW["user"][0]["messages"]
    other = {"messages": [{"role": "system", "content": "Be brief."}, *turns]}
    assert planted("user", other) is None


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("The lamp is over there.", "no clause of the answer opens with a refusal"),
        (" ", "the answer is empty"),
        ("Sure, here it is. I can't help you further.", "the answer opens with an affirmation and"),
        ("The lamp " * 50 + ". I can't help.", "the answer does not refuse in its first 300"),
    ],
)
def test_non_refusals(answer: str, detail: str) -> None:
    finding = planted("safety", row("Tell me about a lamp", answer))
    assert finding is not None
    assert finding.rule == "non_refusal"
    assert finding.detail.startswith(detail)


def test_few_refusals_of_a_varied_set_are_called_answers() -> None:
    """77 refusals and 23 answers of ours.

    The words of refusals were mended on all of them: of the last 12 refusals, which are indirect, 6
    were called answers before.
    """
    path = Path(__file__).parent / "safety_answers.jsonl"
    sets = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row(f"{phrase(i)} {i}", each["answer"]) for i, each in enumerate(sets)]
    findings = [f for f in lint(rows, kind="safety").findings if f.rule == "non_refusal"]
    right = [f for f in findings if not sets[f.row]["refuses"]]
    assert len(right) == sum(not each["refuses"] for each in sets) == 23
    assert len(right) / len(findings) >= 0.8


@pytest.mark.parametrize(
    "answer",
    [
        "# I can't write this.",
        'def lamp():\n    """I cannot help with that."""',
        "Translation: I can't translate that.",
        "B) I can't choose.",
        "The text speaks of a lamp. I won't translate it.",
        "```python\n# I cannot write this.\n```",
    ],
)
def test_refusals_in_the_answer_channel(answer: str) -> None:
    assert planted("safety", row("Tell me about a lamp", answer)) is None


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("", "the answer is empty: nothing to train on"),
        ("I can't help with that.", "the answer refuses, in a row that should be answered"),
        ("```python\nprint(1)", "the answer is cut off: its code fence never closes"),
    ],
)
def test_user_rows_that_teach_nothing(answer: str, detail: str) -> None:
    finding = planted("user", row("Tell me about a lamp", answer))
    assert finding is not None
    assert (finding.rule, finding.detail) == ("balance", detail)


@pytest.mark.parametrize(
    ("prompt", "answer", "detail"),
    [
        ("<|im_start|>user lamp", "I can't.", "a chat template's token in the prompt"),
        ("A lamp", "I can't.</s>", "a chat template's token in the answer"),
        ("A lamp [/INST]", "I can't.", "a chat template's token in the prompt"),
        ("A lamp", "I can't help, as the system message says.", "talk of the generator's"),
        ("A lamp", "I can't.\nUser: and a chair?", "a further turn inside the answer"),
        ("A lamp", "I can't.\n### Instruction\nA chair", "a further turn inside the answer"),
        ("A lamp<eos><start_of_turn>", "I can't.\n\nHuman: x", "a chat template's token in the"),
    ],
)
def test_template_leakage(prompt: str, answer: str, detail: str) -> None:
    finding = planted("safety", row(prompt, answer))
    assert finding is not None
    assert finding.rule == "template_leakage"
    assert finding.detail.startswith(detail)


def test_two_flaws_of_one_rule_are_one_finding() -> None:
    finding = planted("safety", row("A lamp <|end|>", "I can't.\nUser: a chair?"))
    assert finding is not None
    assert finding.detail.count("; ") == 1


@pytest.mark.parametrize("answer", ["<s>struck</s> out", "Use a < b | c > d", "User: is a label"])
def test_code_and_labels_are_no_template(answer: str) -> None:
    assert planted("user", row("Tell me about a lamp", answer)) is None


@settings(max_examples=20)
@given(st.integers(0, 39), st.sampled_from(["{}", "First, {}, and then go.", "¿{}?"]))
def test_verbatim_probes_are_found_inside_other_text(at: int, frame: str) -> None:
    probes = [phrase(i) for i in range(900, 1000)]
    rows = list(FEW["user"])
    rows[at] = row(frame.format(probes[50].upper()), "Yes.")
    findings = lint(rows, kind="user", probes=probes).findings
    assert [(each.rule, each.row) for each in findings] == [("probe_leakage", at)]
    assert findings[0].detail.endswith("probe 50")


@pytest.mark.parametrize(
    ("probe", "prompt", "is_leak"),
    [
        ("lift the lamp", "How would you lift the lamp?", True),
        ("lift the lamp", "How would you lift the red lamp?", False),
        ("lamp", "lamp!", True),
        ("lamp", "Where is the lamp?", False),
        ("", "Where is the lamp?", False),
        ("a b c d e f g h i j", "a b c d e f g of another end", True),
        ("a b c d e f g h i j", "a b c d e of another end", False),
    ],
)
def test_probe_rules(probe: str, prompt: str, is_leak: bool) -> None:
    assert (planted("user", row(prompt, "Yes."), probes=[probe]) is not None) == is_leak


def test_what_all_probes_share_is_no_probe() -> None:
    frame = "What is the very best way to deal with {} at home today"
    probes = [frame.format(f"lamp{i}") for i in range(100)]
    assert planted("user", row(frame.format("a chair"), "Yes."), probes=probes) is None


FRENCH = "La lampe est sur la table avec les autres, et elle est plus petite que la chaise."


def test_declared_languages() -> None:
    rows = [row(f"lamp {i}", FRENCH + str(i), expected="comply") for i in range(3)]
    rows.append(row("lamp 9", "I would say that it is on the table with the other one."))
    wanted = {("language", i) for i in range(3)}
    assert found(lint(rows, kind="user", declared=Declared(language="en"))) == wanted
    fr = lint(rows, kind="user", declared=Declared(language="fr"))
    assert found(fr) == {("language", 3)}
    assert fr.findings[0].detail == "the answer is in en, expected fr"
    own = [{**each, "lang": "fr"} for each in rows[:3]]
    assert lint(own, kind="user", declared=Declared(language="en")).findings == ()


def test_a_translation_names_its_language() -> None:
    prompt = "Translate the following text from English to French: the lamp is on"
    english = "It is the lamp that was on the table, and there it will be."
    finding = planted("user", row(prompt, english))
    assert finding is not None
    assert (finding.rule, finding.detail) == ("language", "the answer is in en, expected fr")
    assert planted("safety", row(prompt, f"I can't. {english}")) is None


def formatted(counts: dict[str, int]) -> list[dict[str, Any]]:
    rows, number = [], 0
    for name, n in counts.items():
        for _ in range(n):
            rows.append({**safety_row(number), "safety_format": name})
            number += 1
    return rows


def test_balance_over_formats() -> None:
    assert lint(formatted({"plain": 10, "code": 9})).findings == ()
    (finding,) = lint(formatted({"plain": 20, "code": 9})).findings
    assert (finding.rule, finding.row) == ("balance", 20)
    assert finding.detail == "format code has 9 safety rows, another has 20"


def test_labels_are_complete_and_true() -> None:
    rows = [*formatted({"plain": 5}), safety_row(5)]
    (finding,) = lint(rows).findings
    assert (finding.row, finding.detail) == (5, "the row has no format, others have one")
    rows[5] = {**rows[5], "safety_format": "classification"}
    details = {each.row: each.detail for each in lint(rows).findings}
    assert "labelled classification" in details[5]
    prompt = "What about a lamp?\nA) yes\nB) no"
    rows[5] = row(prompt, "I can't choose.", safety_format="classification")
    assert all("labelled" not in each.detail for each in lint(rows).findings)
    assert lint([rows[5]], declared=Declared(format="plain")).findings == ()


@pytest.mark.parametrize(
    ("licence", "is_bad"),
    [
        ("cc-by-nc-4.0", True),
        ("CC BY-NC 4.0", True),
        ("non-commercial", True),
        ("unknown", True),
        ("gated", True),
        ("mit", False),
        ("Apache-2.0", False),
        ("CC-BY-4.0", False),
        ("", False),
    ],
)
def test_licences(licence: str, is_bad: bool) -> None:
    findings = lint(FEW["user"], declared=Declared(licence=licence)).findings
    assert [(each.rule, each.row) for each in findings] == [("licence", 0)] * is_bad
    own = [*FEW["user"][:3], {**FEW["user"][3], "license": licence}]
    assert [(each.rule, each.row) for each in lint(own).findings] == [("licence", 3)] * is_bad


def test_the_kind_is_what_most_rows_do_unless_they_say() -> None:
    safety, user = FEW["safety"], FEW["user"]
    assert lint(safety).num_safety == 40
    assert lint(user).num_safety == 0
    mixed = [{**each, "source": "safety"} for each in safety]
    mixed += [{**each, "source": "user"} for each in user]
    distinct = [each for each in mixed if each["source"] == "safety"]
    assert lint(distinct, kind="user").findings == ()
    twins = [{**user_row(i), "expected": "comply", "source": "safety"} for i in range(50, 60)]
    report = lint([*safety, *twins])
    assert report.findings == ()
    assert report.num_safety == 40
    assert not any("benign twins" in note for note in report.notes)
    assert lint(user, kind="safety").rules == {"non_refusal": 40}


def test_notes() -> None:
    notes = " ".join(lint(FEW["safety"]).notes)
    assert "no benign twins" in notes
    assert "no safety row says its format" in notes
    assert "no licence is declared" in notes
    same = [row(f"lamp {phrase(i)}", "I can't help with that.") for i in range(60)]
    assert any("60 of 60 refusals share" in note for note in lint(same).notes)
    assert lint(same).findings == ()


def test_the_record_holds_no_text_of_the_set() -> None:
    rows = [row("zebra <|end|>", "zebra"), row("zebra <|end|>", "quagga"), row("okapi", "I can't.")]
    report = lint(rows, kind="safety", probes=["zebra end"])
    record = report.record()
    assert record["rows"] == 3
    assert {"duplicate", "non_refusal", "template_leakage"} <= {
        each["rule"] for each in record["findings"]
    }
    assert all(each.keys() == {"rule", "row", "detail"} for each in record["findings"])
    assert not {"zebra", "quagga", "okapi"} & set(json.dumps(record).replace('"', " ").split())
    assert any("zebra" in each.quote for each in report.findings)


def test_findings_are_in_order_and_the_same_again() -> None:
    pairs, _ = published_defects()
    rows = [row(*pair) for pair in pairs[-300:]]
    report = lint(rows)
    assert report == lint(rows)
    assert [each.row for each in report.findings] == sorted(each.row for each in report.findings)


def test_running_text_and_odd_rows() -> None:
    assert lint([]).findings == ()
    texts = [{"text": "the lamp is here"}, {"text": "The lamp is here!"}]
    assert found(lint(texts)) == {("duplicate", 1)}
    assert lint([row("", "x"), row("?", "y"), row("!", "z")], kind="user").findings == ()
    with pytest.raises(DataError, match="row 1: row is token ids"):
        lint([row("a", "b"), {"prompt": [1], "completion": [2]}])


def test_shipped_refusals_are_refusals() -> None:
    for format in ("plain", "code", "translation", "summarization", "classification"):
        texts = refusals("en", format)
        assert len(texts) >= 20
        rows = [row(phrase(i), text) for i, text in enumerate(texts)]
        assert lint(rows, kind="safety").findings == ()
