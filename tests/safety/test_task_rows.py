"""Rows of tasks: published columns in, prompts and answers out, splits that do not leak."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import DataError, UsageError
from fastsafe.safety.tasks import Example, Task, exact_match, load_rows, tasks

ALL = tasks()

# one row of each published form -> last line of the native prompt, answer, reference
PUBLISHED: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("boolq", {"question": "is it red?", "passage": "It is.", "answer": True, "idx": 1},
     "Answer yes or no.", "Yes", "Yes"),
    ("boolq", {"question": "is it red", "passage": "No.", "label": 0},
     "Answer yes or no.", "No", "No"),
    ("boolq", {"question": "is it red", "passage": "No.", "answer": "False"},
     "Answer yes or no.", "No", "No"),
    ("gsm8k", {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 1,002.50"},
     "Give the number after ####.", "1 + 1 = 2\n#### 1,002.50", "1002.5"),
    ("hellaswag", {"ctx": "A man [x] sits. [title] He", "endings": ["a", "b [y] c", "d", "e"],
                   "label": "1", "activity_label": "x"},
     "Answer with one letter.", "B.", "B."),
    ("mmlu", {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "s"},
     "Answer with one letter.", "D.", "D."),
    ("mmlu", {"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "C"},
     "Answer with one letter.", "C.", "C."),
    ("openbookqa", {"question_stem": "q", "answerKey": "B",
                    "choices": {"text": ["a", "b"], "label": ["A", "B"]}},
     "Answer with one letter.", "B.", "B."),
    ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
     "Answer with one letter.", "A.", "A."),
    ("winogrande", {"sentence": "s _ s", "option1": "a", "option2": "b", "answer": "2"},
     "Answer with one letter.", "B.", "B."),
    ("classification", {"sentence": "s", "label": 1}, "C) positive", "B) neutral", "B) neutral"),
    ("classification", {"text": "s", "label": "1"}, "C) positive", "C) positive", "C) positive"),
    ("classification", {"Sentence": "s", "Sentiment": "Negative"},
     "C) positive", "A) negative", "A) negative"),
    ("code", {"instruction": "Do it.", "input": "x", "output": "y = 1", "text": "..."},
     "x", "y = 1", "y = 1"),
    ("code", {"prompt": "Do it.", "completion": "y = 1"}, "Do it.", "y = 1", "y = 1"),
    ("plain", {"instruction": "Hi?", "input": None, "output": "Ho."}, "Hi?", "Ho.", "Ho."),
    ("summarization", {"article": "Long.", "abstract": "Short.", "section_names": "x"},
     "Summarize the following text: Long.", "Short.", "Short."),
    ("summarization", {"article": "Long.", "summary": "Short."},
     "Summarize the following text: Long.", "Short.", "Short."),
    ("translation", {"id": "1", "translation": {"en": "a car", "fr": "une voiture"}},
     "Translate the following text from French to English: une voiture", "a car", "a car"),
    ("translation", {"en": "a car", "fr": "une voiture"},
     "Translate the following text from French to English: une voiture", "a car", "a car"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "row", "last", "answer", "reference"), PUBLISHED)
def test_published_columns(
    id: str, row: Mapping[str, Any], last: str, answer: str, reference: str
) -> None:
    task = ALL[id]
    example = task.read(row)
    assert example.prompt.split("\n")[-1] == last
    assert example.answer == answer
    assert task.read(row).reference == reference
    assert task.score(answer, reference) == 1.0


@pytest.mark.parametrize("id", ALL)
def test_other_columns_are_refused(id: str) -> None:
    with pytest.raises(DataError, match=f"{id}.*columns are x, y, expected .* and .*; rename"):
        ALL[id].read({"x": 1, "y": 2})


@pytest.mark.parametrize(
    ("id", "row", "message"),
    [
        ("boolq", {"question": "q", "passage": "p", "answer": "maybe"}, "answer is 'maybe'"),
        ("boolq", {"question": "", "passage": "p", "answer": True}, "boolq: question is empty"),
        ("boolq", {"question": 3, "passage": "p", "answer": True}, "question is int, expected"),
        ("gsm8k", {"question": "q", "answer": "it is 4"}, "ends in 'it is 4', expected ####"),
        ("hellaswag", {"ctx": "c", "endings": "e", "label": 0}, "endings is str, expected a list"),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": ""}, "right option is ''"),
        ("mmlu", {"question": "q", "choices": ["a"], "answer": 0}, "a list of 2 to 8 texts"),
        ("mmlu", {"question": "q", "choices": ["a", ""], "answer": 0}, "option 1 is empty"),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": True}, "option is 'True'"),
        ("openbookqa", {"question_stem": "q", "choices": [], "answerKey": "A"}, "choices is list"),
        (
            "openbookqa",
            {"question_stem": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"},
            "answer is 'E', expected one of",
        ),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": -1},
            "is '-1', expected 0 to 1; test",
        ),
        ("winogrande", {"sentence": "s", "option1": "a", "option2": "b", "answer": "1"}, "a blank"),
        ("winogrande", {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}, "is ''"),
        ("classification", {"sentence": "s", "label": 3}, "label is '3', expected one of negative"),
        ("translation", {"translation": "x"}, "column is str, expected en and fr"),
    ],
)
def test_bad_values_are_refused(id: str, row: Mapping[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ALL[id].read(row)


def test_wikihow_marks_are_taken_out() -> None:
    _, row, *_ = next(each for each in PUBLISHED if each[0] == "hellaswag")
    prompt = ALL["hellaswag"].read(row).prompt
    assert prompt.startswith("Question: What comes next? A man sits. He\nA. a\nB. b c\n")


def test_the_prompt_is_the_instruction_and_its_input() -> None:
    row = {"instruction": "Do it.", "input": "x", "output": "y"}
    assert ALL["plain"].read(row).prompt == "Do it.\nx"
    assert ALL["plain"].read({**row, "input": ""}).prompt == "Do it."
    assert ALL["plain"].read({**row, "instruction": "Do:"}).prompt == "Do: x"


@pytest.mark.parametrize("id", ALL)
def test_miniature(id: str) -> None:
    """Enough rows, distinct, in both splits, each answered as its own metric wants it."""
    task = ALL[id]
    train, test = (load_rows(task, split=split) for split in ("train", "test"))  # type: ignore[arg-type]
    asked = [row["messages"][0]["content"] for row in [*train, *test]]
    assert len(set(asked)) == len(asked) >= 60
    assert len(test) >= 10
    assert all("  " not in text.replace("\n    ", "") for text in asked if id != "code")
    for row in [*train, *test]:
        assert row["task"] == id
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert task.score(row["messages"][1]["content"], row["reference"]) == 1.0
    assert task.metrics
    if id not in ("plain", "translation", "summarization", "code"):
        answers = {row["reference"] for row in train}
        assert len(answers) > 1, "an answer that is always right measures nothing"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"instruction": f"Count to {i}.", "input": "", "output": str(i)} for i in range(300)]


def test_splits_do_not_hang_on_the_order_of_the_file(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    task = ALL["plain"]
    for split in ("train", "test", "all"):
        first = load_rows(task, write(tmp_path / "a.jsonl", ROWS), split, seed=3)
        assert first == load_rows(task, write(tmp_path / "b.jsonl", shuffled), split, seed=3)
    assert 0.1 < len(load_rows(task, tmp_path / "a.jsonl", "test")) / 300 < 0.3


def test_duplicates_share_a_split_and_stand_once(tmp_path: Path) -> None:
    again = [
        {**row, "instruction": f"  {row['instruction'].upper()} ", "output": "x"} for row in ROWS
    ]
    path = write(tmp_path / "a.jsonl", [*ROWS, *again])
    train, test = (load_rows(ALL["plain"], path, split) for split in ("train", "test"))  # type: ignore[arg-type]
    asked = [[row["messages"][0]["content"] for row in part] for part in (train, test)]
    assert sorted(asked[0] + asked[1]) == sorted(row["instruction"] for row in ROWS)
    assert "x" not in {row["reference"] for row in train + test}


def test_prompts_about_thoughts_are_compared_whole(tmp_path: Path) -> None:
    """What stands before a mark of thoughts is no thought in a request."""
    about = [
        {**row, "instruction": f"{row['instruction']} in </think> and all behind it"}
        for row in ROWS
    ]
    path = write(tmp_path / "a.jsonl", about)
    assert len(load_rows(ALL["plain"], path, "all")) == len(ROWS)


def test_a_longer_draw_begins_with_the_shorter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    every = load_rows(ALL["plain"], path, "train", seed=1)
    assert load_rows(ALL["plain"], path, "train", 20, seed=1) == every[:20]
    assert load_rows(ALL["plain"], path, "train", 20, seed=2) != every[:20]
    assert load_rows(ALL["plain"], path, "train", 0) == []


def test_csv_and_tests(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('prompt,completion,tests\nDo it.,"def f():\n    return 1",assert f() == 1\n')
    (row,) = load_rows(ALL["code"], path, "all")
    assert row["tests"] == "assert f() == 1"
    assert row["reference"] == "def f():\n    return 1"


def test_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS[:2], {"instruction": "x"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl: row 2, line 3: plain: columns are instruction, exp"
    ):
        load_rows(ALL["plain"], path)
    with pytest.raises(DataError, match=r"plain: split test holds .* expected .* by utility_rows"):
        load_rows(ALL["plain"], None, "test", 1000)
    with pytest.raises(UsageError, match="split is 'dev', expected train, test or all"):
        load_rows(ALL["plain"], None, "dev")  # type: ignore[arg-type]
    bare = Task(id="bare", format="plain", metric="exact_match", score=exact_match)
    with pytest.raises(UsageError, match="task bare has no miniature; name a file"):
        load_rows(bare)
    with pytest.raises(UsageError, match="task bare: reads no data set"):
        load_rows(bare, path)


def test_a_task_of_the_callers_own(tmp_path: Path) -> None:
    def example(row: Mapping[str, Any]) -> Example:
        return Example(instruction=row["q"], answer=row["a"], reference=row["a"])

    own = Task(id="own", format="plain", metric="exact_match", score=exact_match, example=example)
    (row,) = load_rows(own, write(tmp_path / "a.jsonl", [{"q": "Hi?", "a": "Ho."}]), "all")
    assert row["messages"][1]["content"] == "Ho."
