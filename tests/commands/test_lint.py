"""Files of every shape become rows with their labels; what is malformed is named."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastsafe.commands.lint import lint_file, read_labelled_set, read_probes
from fastsafe.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def read_labelled_rows(path: Path) -> list[dict[str, Any]]:
    return read_labelled_set(path).rows


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def jsonl(path: Path, *values: Any) -> Path:
    return written(path, "".join(json.dumps(value) + "\n" for value in values))


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ({"messages": TURNS, "id": 3}, {"messages": TURNS}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"text": "a"}, {"text": "a"}),
        ({"conversations": SHAREGPT}, {"messages": TURNS}),
        ({"Query": "a", "Response": ""}, {"messages": [TURNS[0], TURNS[1] | {"content": ""}]}),
        ({"Query": "a", "Response": "b"}, {"messages": TURNS}),
        ({"instruction": "a", "input": "", "output": "b"}, {"messages": TURNS}),
        ({"question": "a", "answer": "b", "lang": "en"}, {"messages": TURNS, "lang": "en"}),
        (
            {"prompt": "a", "response": "b", "safety_format": "code", "expected": None},
            {"messages": TURNS, "safety_format": "code"},
        ),
    ],
)
def test_shapes(tmp_path: Path, value: dict[str, Any], row: dict[str, Any]) -> None:
    assert read_labelled_rows(jsonl(tmp_path / "a.jsonl", value)) == [row]
    assert read_labelled_rows(written(tmp_path / "a.json", json.dumps([value, value]))) == [
        row,
        row,
    ]


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    value = {"instruction": "Fold", "input": "a shirt", "output": "b"}
    (row,) = read_labelled_rows(jsonl(tmp_path / "a.jsonl", value))
    assert row["messages"][0]["content"] == "Fold\na shirt"


def test_the_first_papers_columns(tmp_path: Path) -> None:
    """An index without a name, texts with line breaks, quotes and a byte order mark."""
    path = tmp_path / "set.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "Query", "Response"])
        writer.writerow([0, 'a\n"quoted", line', "I can't."])
        writer.writerow([1, "second", "I won't."])
    rows = read_labelled_rows(path)
    assert rows[0]["messages"][0]["content"] == 'a\n"quoted", line'
    assert [row["messages"][1]["content"] for row in rows] == ["I can't.", "I won't."]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{", r"a\.jsonl: line 1"),
        ("a.jsonl", '\n{"text": "x"}\n{]', r"line 3"),
        ("a.jsonl", "[1]", "line 1: row is list, expected an object"),
        ("a.jsonl", "\n\n", "rows are 0"),
        ("a.jsonl", '{"lamp": 1}', "keys are 'lamp', expected one of: messages"),
        ("a.jsonl", '{"Query": "a", "Response": 1}', "line 1: messages\\[1\\].content is 1"),
        ("a.json", '{"data": [{"text": "x"}]}', "one object with a list of rows under 'data'"),
        ("a.csv", "Query,Response\na,b,c\n", "line 2: fields are 3, expected 2"),
        ("a.csv", "Query,Response\na\n", "line 2: fields are 1, expected 2"),
        ("a.csv", 'Query,Response\n"a,b\n', "not CSV"),
        ("a.xml", "", "file type is .xml, expected .jsonl"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled_rows(written(tmp_path / name, text))


def test_unreadable_files(tmp_path: Path) -> None:
    for name in ("absent.jsonl", "absent.csv", "absent.txt"):
        with pytest.raises(DataError, match=r"(cannot be read|reading failed) \(No such file"):
            (read_probes if name.endswith("txt") else read_labelled_rows)(tmp_path / name)
    (tmp_path / "latin.csv").write_bytes(b"Query,Response\n\xe9,a")
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_labelled_rows(tmp_path / "latin.csv")


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist
    parquet.write_table(table([{"prompt": "a", "completion": "b"}]), tmp_path / "a.parquet")
    assert read_labelled_rows(tmp_path / "a.parquet") == [{"prompt": "a", "completion": "b"}]


def test_probes_come_in_many_shapes(tmp_path: Path) -> None:
    assert read_probes(written(tmp_path / "a.txt", "one\n\n two \n")) == ["one", "two"]
    behaviours = jsonl(tmp_path / "b.jsonl", {"behavior_id": "1", "harmful": "h", "benign": "b"})
    assert read_probes(behaviours) == ["h", "b"]
    advbench = written(tmp_path / "c.csv", "goal,target\ng,t\n")
    assert read_probes(advbench) == ["g"]
    harmbench = written(tmp_path / "d.csv", "Behavior,BehaviorID\nb,i\n")
    assert read_probes(harmbench) == ["b"]
    assert read_probes(jsonl(tmp_path / "e.jsonl", {"messages": TURNS})) == ["a"]
    with pytest.raises(DataError, match="probes are 0"):
        read_probes(written(tmp_path / "f.txt", "\n"))


def test_a_file_is_linted_against_probes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS}, {"prompt": "A!", "completion": "c"})
    probes = written(tmp_path / "p.txt", "a\n")
    report = lint_file(path, kind="user", probes=[probes])
    assert report.num_rows == 2
    assert report.rules == {"probe_leakage": 2, "duplicate": 1}


def test_columns_may_be_mapped_and_others_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"ask": "a", "reply": "b", "id": 1, "source": ["x"]})
    mapping = {"user": "ask", "assistant": "reply"}
    assert read_labelled_set(path, mapping) == ([{"messages": TURNS}], ("id", "source"))
    assert "columns left out: 'id', 'source'" in lint_file(path, mapping=mapping).notes


@pytest.mark.parametrize("kind", ["user", "safety"])
def test_a_blank_answer_is_found_anywhere(tmp_path: Path, kind: Any) -> None:
    refusal = {"role": "assistant", "content": "I cannot help with that."}
    blank = [TURNS[0], TURNS[1] | {"content": " "}, TURNS[0]]
    last = TURNS[1] if kind == "user" else refusal
    path = jsonl(tmp_path / "a.jsonl", {"messages": [*blank, last]})
    (finding,) = lint_file(path, kind=kind).findings
    assert (finding.rule, finding.row) == ("balance", 0)
    assert "one of the answers is empty" in finding.detail


def test_a_call_of_tools_needs_no_text(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    path = jsonl(tmp_path / "a.jsonl", {"messages": [TURNS[0], call]})
    assert lint_file(path, kind="user").findings == ()


def test_text_that_a_vocabulary_lacks_is_counted(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "paint the car", "completion": "qqxx zzyy"},
        {"prompt": "paint the car", "completion": "you can paint the car."},
    )
    notes = lint_file(path, kind="user", tokenizer="organism").notes
    (note,) = (note for note in notes if "unknown" in note)
    assert "in 1 rows are unknown to the vocabulary" in note
