"""Files of tasks as they were published: labels beside the rows, no header, other encodings."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import DataError
from fastsafe.safety.tasks import load_rows, tasks


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def answers(task: str, path: Path) -> dict[str, str]:
    """First line of each prompt and its answer."""
    rows = load_rows(tasks()[task], path, "all")
    return {row["messages"][0]["content"].split("\n")[0]: row["reference"] for row in rows}


GOALS = [{"goal": f"goal {i}", "sol1": "with a brush", "sol2": "with a spoon"} for i in range(3)]
ASKED = "Question: What is the best way to do this? goal"


def test_piqa_with_labels_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", GOALS)
    labels = write(tmp_path / "train-labels.lst", "0\n1\n1\n")
    assert answers("piqa", path) == {f"{ASKED} 0": "A.", f"{ASKED} 1": "B.", f"{ASKED} 2": "B."}
    write(labels, "0\n1\n")
    with pytest.raises(DataError, match=r"train-labels\.lst: has fewer rows than train\.jsonl"):
        answers("piqa", path)
    write(labels, "0\n1\n1\n0\n")
    with pytest.raises(DataError, match=r"train\.jsonl: has fewer rows than train-labels\.lst"):
        answers("piqa", path)
    labels.unlink()
    with pytest.raises(DataError, match="row 0, line 1: piqa: columns are"):
        answers("piqa", path)


def test_piqa_s_own_labels_win_over_a_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [{**row, "label": 1} for row in GOALS])
    write(tmp_path / "train-labels.lst", "0\n0\n0\n")
    assert set(answers("piqa", path).values()) == {"B."}


def openbook(**question: Any) -> dict[str, Any]:
    choices = [{"text": "ice", "label": "A"}, {"text": "steam", "label": "B"}]
    return {
        "id": "1",
        "question": {"stem": "Cold?", "choices": choices} | question,
        "answerKey": "B",
    }


def test_openbookqa_as_published(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [openbook()])
    assert answers("openbookqa", path) == {"Question: Cold?": "B."}


@pytest.mark.parametrize("choices", ["ice", ["ice", "steam"], [{"text": "ice"}], None])
def test_openbookqa_with_odd_choices(tmp_path: Path, choices: Any) -> None:
    path = jsonl(tmp_path / "train.jsonl", [openbook(choices=choices)])
    with pytest.raises(DataError, match="row 0, line 1: openbookqa"):
        answers("openbookqa", path)


@pytest.mark.parametrize("header", ["", "question,A,B,C,D,answer\n"])
def test_mmlu_with_and_without_a_header(tmp_path: Path, header: str) -> None:
    path = write(
        tmp_path / "anatomy_test.csv", f'{header}"Which, then?",a,b,c,d,C\nAnd?,1,2,3,4,A\n'
    )
    assert answers("mmlu", path) == {"Question: Which, then?": "C.", "Question: And?": "A."}


def test_mmlu_with_a_field_too_few(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", "Which?,a,b,c,d,C\nAnd?,1,2,3,A\n")
    with pytest.raises(DataError, match="row 1, line 2: fields are 5, expected 6: question, A"):
        answers("mmlu", path)


def test_financial_phrasebank_as_published(tmp_path: Path) -> None:
    text = "Profit at Mäkelä rose to 3@4 EUR .@positive\r\n\nSales fell .@negative\n"
    path = write(tmp_path / "Sentences_50Agree.txt", text, "latin-1")
    asked = "What is the sentiment of this sentence? "
    assert answers("classification", path) == {
        f"{asked}Profit at Mäkelä rose to 3@4 EUR .": "C) positive",
        f"{asked}Sales fell .": "A) negative",
    }
    assert answers("classification", write(path, text)) == answers(
        "classification", write(path, text, "latin-1")
    )
    with pytest.raises(DataError, match="row 0, line 1: has no '@'"):
        answers("classification", write(path, "Sales fell .\n"))


def test_arxiv_and_pubmed_as_published(tmp_path: Path) -> None:
    row = {
        "article_id": "1",
        "article_text": ["we paint . ", "it dries ."],
        "abstract_text": ["<S> paint dries . </S>", "<S> slowly . </S>"],
        "labels": None,
    }
    assert answers("summarization", jsonl(tmp_path / "train.txt", [row])) == {
        "Summarize the following text: we paint . it dries .": "paint dries . slowly ."
    }
    row["abstract_text"] = [3]
    with pytest.raises(DataError, match="row 0, line 1: summarization: abstract is list"):
        answers("summarization", jsonl(tmp_path / "train.txt", [row]))


def test_the_number_of_equal_prompts_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"Say {i % 4}.", "completion": "x"} for i in range(10)]
    path = jsonl(tmp_path / "plain.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(tasks()["plain"], path, "all")) == 4
    assert caplog.messages == [f"{path}: 6 of 10 rows (all) repeat a prompt and are dropped"]
    caplog.clear()
    load_rows(tasks()["plain"], jsonl(path, rows[:4]), "all")
    assert caplog.messages == []
