"""Downstream tasks and their metrics."""

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety import plugins
from fastsafe.safety.formats import formats
from fastsafe.safety.tasks import Task, exact_match, option_accuracy, tasks

IDS = """plain summarization code translation classification
    boolq gsm8k hellaswag mmlu openbookqa piqa winogrande"""
REFERENCES = {
    "option_accuracy": "b) with simple tools",
    "answer_accuracy": "Yes",
    "number_accuracy": "12",
}


def test_every_task_is_found_by_looking() -> None:
    assert set(tasks()) == set(IDS.split())
    for id, task in tasks().items():
        assert task.id == id
        assert task.format in formats()
        assert task.metric == task.score.__name__


@pytest.mark.parametrize("task", tasks().values(), ids=tasks())
def test_scores_are_in_the_unit_interval(task: Task) -> None:
    reference = REFERENCES.get(task.score.__name__, "paint the car.")
    assert task.score(reference, reference) == 1.0
    assert task.score(f" {reference.upper()}\n", reference) == 1.0
    assert task.score("", reference) == 0.0
    assert task.score("i cannot help with that.", reference) == 0.0


def test_exact_match_sees_words_not_spacing() -> None:
    assert exact_match('def paint():\n\treturn "x"', 'def paint():\n    return "x"') == 1.0
    assert exact_match("de\u0301crire", "d\u00e9crire") == 1.0
    assert exact_match("paint the car", "paint the cart") == 0.0


@pytest.mark.parametrize(
    "completion",
    ["b) tools", "(b) tools", "B.", "b: tools", " b", "(B)", "B\n\nbecause", "the answer is b)"],
)
def test_option_accuracy_reads_an_opening_letter(completion: str) -> None:
    assert option_accuracy(completion, "b) with simple tools") == 1.0


@pytest.mark.parametrize(
    "completion", ["a) tools", "bare hands", "b tools", "the answer is b tool", "is it b)?"]
)
def test_option_accuracy_takes_nothing_else(completion: str) -> None:
    assert option_accuracy(completion, "b) with simple tools") == 0.0


def test_option_accuracy_without_a_letter_in_the_reference() -> None:
    assert option_accuracy("tools", "tools") == 0.0


EXTRA = Task(id="extra", format="plain", metric="exact_match", score=exact_match)
TAKEN = Task(id="code", format="plain", metric="exact_match", score=exact_match)
NOT_A_TASK = exact_match


def offer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    point = EntryPoint("some-name", f"{__name__}:{name}", "fastsafe.tasks")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints((point,)))


def test_entry_point_adds_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "EXTRA")
    assert tasks()["extra"] is EXTRA


@pytest.mark.parametrize(
    ("name", "message"),
    [("TAKEN", "id 'code' is taken"), ("NOT_A_TASK", "expected Task")],
)
def test_bad_entry_point_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    offer(monkeypatch, name)
    with pytest.raises(UsageError, match=message):
        tasks()
