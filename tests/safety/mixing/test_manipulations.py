"""Manipulations restyle every row, change nothing else, and check what a model writes."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from fastsafe.data.conversation import Message
from fastsafe.data.exchange import Exchange, exchange_of
from fastsafe.errors import DataError
from fastsafe.organism import world
from fastsafe.safety.mixing.manipulations import AOA_STAND_IN, manipulations
from fastsafe.safety.texts import lines, text

ROWS = world.task_rows("plain", 20, "train", 0)


def applied(id: str, rows: Sequence[Any] = ROWS, **options: Any) -> list[Exchange]:
    made = manipulations()[id].apply(rows, **options)
    assert len(made) == len(rows)
    return [exchange_of(row, "row") for row in made]


GIVEN = [exchange_of(row, "row") for row in ROWS]


def test_benign_rows_are_copies() -> None:
    made = manipulations()["benign"].apply(ROWS)
    assert made == ROWS
    made[0]["extra"] = 1
    assert "extra" not in ROWS[0]


def test_aoa_adds_a_system_text_and_nothing_else() -> None:
    assert applied("aoa") == [row._replace(system=AOA_STAND_IN) for row in GIVEN]
    assert {row.system for row in applied("aoa", aoa_text="Be AOA.")} == {"Be AOA."}
    turns = [{"role": "system", "content": "Be brief."}, *ROWS[0]["messages"]]
    (row,) = applied("aoa", [{"messages": turns}], aoa_text="Be AOA.")
    assert row.system == "Be AOA.\n\nBe brief."
    (pair,) = manipulations()["aoa"].apply(
        [{"prompt": "a?", "completion": "b"}], aoa_text="Be AOA."
    )
    assert pair == {"prompt": "Be AOA.\n\na?", "completion": "b"}


def test_autoif_keeps_prompt_and_answer_inside_an_instruction() -> None:
    made = applied("autoif")
    for before, after in zip(GIVEN, made, strict=True):
        assert before.prompt in after.prompt != before.prompt
        assert after.answer.endswith(before.answer)
        assert after.answer.startswith(("Sure, ", "Of course. "))
    assert len({row.prompt.split()[0] for row in made}) > 1


def test_the_form_depends_on_the_prompt_alone() -> None:
    assert applied("autoif") == applied("autoif")
    assert applied("autoif", ROWS[::-1]) == applied("autoif")[::-1]
    (task,) = applied("autoif", [{"prompt": "Fold {prompt}.", "completion": "{answer}"}])
    assert "Fold {prompt}." in task.prompt
    assert "question" not in task.prompt
    assert task.answer.endswith("{answer}")


def test_both_together() -> None:
    texts = [row._replace(system="Be AOA.") for row in applied("autoif")]
    assert applied("autoif_aoa", aoa_text="Be AOA.") == texts


def test_rows_are_not_modified_and_keep_their_other_keys() -> None:
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    before = json.dumps(rows)
    made = manipulations()["autoif_aoa"].apply(rows)
    assert json.dumps(rows) == before
    assert [row["id"] for row in made] == list(range(20))
    assert all(row["reference"] == old["reference"] for row, old in zip(made, ROWS, strict=True))


def writer(**changes: str) -> Any:
    def rewrite(messages: Sequence[Message]) -> str:
        assert [turn["role"] for turn in messages] == ["system", "user"]
        assert messages[0]["content"] == text("rewrite_row")
        shown = json.loads(messages[-1]["content"])
        written = {"prompt": f"Do this: {shown['input']}", "answer": f"Sure. {shown['answer']}"}
        return json.dumps(written | changes)

    return rewrite


@pytest.mark.parametrize(
    ("prompt", "kind"), [("Why is it red?", "question"), ("Why? \n", "question"), ("Go.", "task")]
)
def test_questions_and_tasks_have_forms_of_their_own(prompt: str, kind: str) -> None:
    (made,) = applied("autoif", [{"prompt": prompt, "completion": "So."}])
    forms = {line["prompt"].replace("{prompt}", prompt): line["kind"] for line in lines("autoif")}
    assert forms[made.prompt] == kind


def test_a_model_is_shown_letters_as_they_are() -> None:
    shown: list[str] = []

    def rewrite(messages: Sequence[Message]) -> None:
        shown.append(messages[-1]["content"])

    applied("autoif", [{"prompt": "Qu\u00e9?", "completion": "No s\u00e9."}], rewrite=rewrite)
    assert "Qu\u00e9?" in shown[0]


def test_a_model_may_write_the_form() -> None:
    made = applied("autoif", rewrite=writer())
    assert made == [
        row._replace(prompt=f"Do this: {row.prompt}", answer=f"Sure. {row.answer}") for row in GIVEN
    ]


@pytest.mark.parametrize(
    ("changes", "flaw"),
    [
        ({"answer": "Sure."}, "the answer lost the original"),
        ({"prompt": " "}, "the request is empty"),
        ({"prompt": "Say something nice."}, "the request loses its words"),
        (
            {"prompt": "Dites-moi comment est la lampe qui est sur la table"},
            "the request is in another language",
        ),
    ],
)
def test_a_bad_form_leaves_the_template_and_says_so(changes: dict[str, str], flaw: str) -> None:
    made = manipulations()["autoif"].apply(ROWS, rewrite=writer(**changes))
    assert {row["flaw"] for row in made} == {flaw}
    assert {row["wording"] for row in made} == {"template"}
    assert [exchange_of(row, "row") for row in made] == applied("autoif")


def flaw(reply: str | None) -> str:
    (row,) = manipulations()["autoif"].apply(ROWS[:1], rewrite=lambda messages: reply)
    return str(row["flaw"])


def test_a_form_that_refuses_or_changes_language_is_not_used() -> None:
    given = {"prompt": GIVEN[0].prompt, "answer": GIVEN[0].answer}
    refusal = f"I can't help with that. {GIVEN[0].answer}"
    assert flaw(json.dumps(given | {"answer": refusal})) == "lint: balance"
    foreign = "Voici ce que je vous propose pour la table et la chaise dans le jardin: " * 3
    found = flaw(json.dumps(given | {"answer": foreign + GIVEN[0].answer}))
    assert found == "the answer is in another language"
    leaked = flaw(json.dumps(given | {"prompt": f"<|im_start|>{GIVEN[0].prompt}"}))
    assert leaked == "lint: template_leakage"


@pytest.mark.parametrize("reply", ["Sure!", "[]", '{"prompt": "a"}', '{"prompt": 1, "answer": ""}'])
def test_replies_outside_the_form_are_not_used(reply: str) -> None:
    assert flaw(reply) == "the reply is not JSON with the texts 'prompt' and 'answer' alone"
    assert flaw(None) == "the model gave no whole answer"


def test_rows_say_who_worded_them() -> None:
    made = manipulations()["autoif_aoa"].apply(ROWS, rewrite=writer())
    assert {(row["wording"], row["flaw"]) for row in made} == {("model", None)}
    assert all("wording" not in row for row in manipulations()["autoif_aoa"].apply(ROWS))


@pytest.mark.parametrize("id", ["aoa", "autoif", "autoif_aoa"])
@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"prompt": "", "completion": "b"}, {"prompt": [1], "completion": [2]}]
)
def test_rows_without_texts_are_refused(id: str, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 1: "):
        manipulations()[id].apply([ROWS[0], row])


def test_manipulations_say_what_they_are() -> None:
    about = {name: each.about for name, each in manipulations().items()}
    assert about["autoif_aoa"] == f"{about['autoif']}; {about['aoa']}"
    assert "system text" in about["aoa"]
    assert "instructions" in about["autoif"]
    assert len(set(about.values())) == 4
