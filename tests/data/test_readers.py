"""Rows of every shape become rows that train what they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastsafe.data import shapes
from fastsafe.data.packing import TrainExample
from fastsafe.data.readers import Dataset, encode, read_rows
from fastsafe.errors import DataError, UsageError


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    opening = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {
        "messages": opening
        + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def text(words: str) -> dict[str, Any]:
    """A part of a content, with what a parquet file has for the other kinds of parts."""
    return {"type": "text", "text": words, "image": None}


def turns(*pairs: str) -> list[dict[str, str]]:
    return [
        {"from": who, "value": text} for who, _, text in (pair.partition(":") for pair in pairs)
    ]


def write(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("shape", "raw", "row"),
    [
        ("messages", chat("q", "a"), chat("q", "a")),
        (
            "messages",
            {"messages": [{"role": "user", "content": "q", "name": "x", "weight": None}]},
            {"messages": [{"role": "user", "content": "q", "name": "x"}]},
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "r"}]},
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "r"}]},
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [text("a "), text("b")]}]},
            {"messages": [{"role": "user", "content": "a b"}]},
        ),
        ("prompt-completion", *[{"prompt": "p", "completion": "c"}] * 2),
        (
            "prompt-completion",
            *[{"prompt": chat("q")["messages"], "completion": chat("q", "a")["messages"][1:]}] * 2,
        ),
        ("text", {"text": "t", "label": 1}, {"text": "t"}),
        ("tokens", *[{"token_ids": [1, 2], "trained": [False, True]}] * 2),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, chat("q", "a")),
        ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, chat("q\ni", "a")),
        (
            "alpaca",
            {
                "instruction": "q",
                "output": "a",
                "system": "s",
                "history": [["q0", "a0"]],
            },
            chat("q0", "a0", "q", "a", system="s"),
        ),
        (
            "sharegpt",
            {"conversations": turns("human:q", "gpt:a"), "system": "s"},
            chat("q", "a", system="s"),
        ),
        (
            "sharegpt",
            {"conversations": turns("system:s", "user:q", "function_call:f", "observation:o")},
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "f"},
                    {"role": "tool", "content": "o"},
                ]
            },
        ),
        (
            "summarization",
            {"article": "long", "summary": "short"},
            chat("Summarize the following text.\n\nlong", "short"),
        ),
        (
            "multiple-choice",
            {"question": "q", "choices": ["x", "y"], "solution": "B. y"},
            chat("q\nA. x\nB. y", "B. y"),
        ),
        (
            "multiple-choice",
            {"question": "q", "choices": ["x", "y"], "answer": 1},
            chat("q\nA. x\nB. y", "B"),
        ),
        ("question-answer", {"question": "q", "answer": "a"}, chat("q", "a")),
        (
            "question-answer",
            {"context": "c", "question": "q", "answer": "a"},
            chat("c\n\nq", "a"),
        ),
    ],
)
def test_shapes(tmp_path: Path, shape: str, raw: Any, row: Any) -> None:
    found = read_rows(write(tmp_path, raw))
    assert (found.shape, list(found.rows)) == (shape, [row])


def test_the_first_shape_that_fits_wins(tmp_path: Path) -> None:
    found = read_rows(write(tmp_path, {"prompt": "p", "prompt_id": "7", **chat("q", "a")}))
    assert found.shape == "messages"
    assert found.describe() == "messages (messages), 1 rows; left out: prompt, prompt_id"


def test_what_was_found_is_said(tmp_path: Path) -> None:
    rows = [{"id": i, "instruction": "q", "output": "a"} for i in range(1203)]
    rows[7]["input"] = "i"
    found = read_rows(write(tmp_path, *rows))
    assert found.describe() == "alpaca (instruction, output, input), 1,203 rows; left out: id"
    assert found.locations[3] == f"{tmp_path / 'x.jsonl'}: row 3, line 4"


def test_null_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """Tables have every column in every row."""
    found = read_rows(
        write(tmp_path, {"messages": None, "system": None, "prompt": "p", "completion": "c"})
    )
    assert found.shape == "prompt-completion"


def test_parts_and_limits(tmp_path: Path) -> None:
    parts = [write(tmp_path, {"text": f"{i}"}, {"text": "x"}, name=f"{i}.jsonl") for i in range(3)]
    found = read_rows(parts)
    assert [row["text"] for row in found.rows] == ["0", "x", "1", "x", "2", "x"]
    assert found.locations[2] == f"{parts[1]}: row 0, line 1"
    assert len(read_rows(parts, limit=3).rows) == 3
    broken = write(tmp_path, {"text": "a"}, 7)
    assert len(read_rows(broken, limit=1).rows) == 1


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (7, "line 2: row is int"),
        ({"text": 1}, "line 2: text is '?1'?, expected a string"),
        (
            {"prompt": "p"},
            "line 2: text is missing, expected a row of shape text like the first one",
        ),
        ({}, "line 2: text is missing"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, raw: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        read_rows(write(tmp_path, {"text": "t"}, raw))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"q": 1, "a": 2}, "keys are 'q, a', expected one of: messages .*--map"),
        ({"instruction": 1, "output": "a"}, r"messages\[0\].content is '?1'?"),
        ({"instruction": 1, "input": "i", "output": "a"}, "instruction is 1, expected a string"),
        ({"instruction": "q", "output": "a", "history": "h"}, "history is not a list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history has"),
        ({"conversations": "x"}, "conversations is 'x', expected a list of turns"),
        ({"conversations": turns("bot:x")}, r"conversations\[0\] is from 'bot', expected one of"),
        ({"conversations": [7]}, r"conversations\[0\] is from None"),
        ({"conversations": []}, r"messages is \[\]"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "choices is .* expected 2 to 26"),
        ({"question": "q", "choices": ["x", 1], "answer": 0}, "choices is"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "answer is 2, expected an index"),
        ({"messages": [{"role": "user"}, 7]}, r"messages\[0\].content is"),
        ({"messages": "hello"}, "messages is 'hello'"),
        ({"prompt": chat("q")["messages"], "completion": "a"}, "both strings, both lists of turns"),
        ({"token_ids": [1], "trained": [1]}, r"trained is \[1\], expected a list of bool"),
        ({"token_ids": [1], "trained": []}, "trained has 0 marks, expected 1"),
    ],
)
def test_values_of_a_wrong_type(tmp_path: Path, raw: Any, why: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl: row 0, line 1: .*{why}"):
        read_rows(write(tmp_path, raw))


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows are 0"):
        read_rows(write(tmp_path))


def test_a_csv_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('instruction,input,output,id\n"say, hi",,hi,1\n')
    found = read_rows(path)
    assert found.rows == [chat("say, hi", "hi")]
    assert found.left_out == ("id",)


def test_columns_that_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "x", "a": "y", "s": "z", "id": 1})
    pair = read_rows(path, mapping={"prompt": "q", "completion": "a"})
    assert pair.rows == [{"prompt": "x", "completion": "y"}]
    assert pair.describe() == "mapped (q, a), 1 rows; left out: s, id"
    talk = read_rows(path, mapping={"user": "q", "assistant": "a", "system": "s"})
    assert talk.rows == [chat("x", "y", system="z")]
    assert read_rows(path, mapping={"text": "s"}).rows == [{"text": "z"}]
    with pytest.raises(DataError, match="line 1: b is missing, expected a row of shape mapped"):
        read_rows(path, mapping={"text": "b"})
    with pytest.raises(UsageError, match=r"--map: it sets prompt, expected user, assistant, \[sys"):
        read_rows(path, mapping={"prompt": "q"})


def test_mappings_are_parsed() -> None:
    assert shapes.parse_mapping(["user=q, assistant=a", "system=s=t"]) == {
        "user": "q",
        "assistant": "a",
        "system": "s=t",
    }
    for bad in ("user", "=q", "user=", "user=a,user=b", ""):
        with pytest.raises(UsageError, match="--map"):
            shapes.parse_mapping([bad])


class Words:
    """One id per word; the end of text is 1."""

    name, eos_ids, id_bound, unk_id = "words", (1,), 1000, 9

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + len(word) for word in text.split()]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join("x" * (i - 2) for i in ids)

    def render_chat(
        self, messages: Any, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        raise NotImplementedError


def data(*rows: dict[str, Any]) -> Dataset:
    return Dataset("x", "text", ("text",), (), rows, [f"x: line {i + 1}" for i in range(len(rows))])


def test_encoding_counts() -> None:
    found = encode(data({"text": "a b c"}, {"prompt": "a b", "completion": "c"}), Words())
    assert found.examples[1] == TrainExample((3, 3, 3, 1), (False, False, True, True))
    assert (found.num_tokens, found.num_trained, found.num_truncated) == (7, 4, 0)


def test_long_rows_stop_or_are_cut() -> None:
    long = data({"text": "a"} | {"text": "a b"}, {"text": "a b c d"})
    with pytest.raises(DataError, match=r"line 2: row has 4 tokens, expected at most 3.*--trunc"):
        encode(long, Words(), max_length=3)
    cut = encode(long, Words(), max_length=3, truncate=True)
    assert cut.num_truncated == 1
    assert [len(example.token_ids) for example in cut.examples] == [2, 3]
    hidden = data({"prompt": "a b c", "completion": "d"})
    with pytest.raises(DataError, match="line 1: trained tokens are 0 among the first 3 of 5"):
        encode(hidden, Words(), max_length=3, truncate=True)


def test_nothing_to_train_on_stops_with_its_place() -> None:
    with pytest.raises(DataError, match="x: line 2: trained tokens are 0"):
        encode(data({"text": "a b"}, {"text": "a"}), Words())
    with pytest.raises(DataError, match="x: line 1: a token id is 1000"):
        encode(data({"token_ids": [3, 1000], "trained": [False, True]}), Words())


@pytest.mark.parametrize(
    "row",
    [
        chat("a", " \n"),
        chat("a", "", "b"),
        chat("a", "", "b", "c"),
        chat("a", "b", "c", "\t"),
        {"prompt": "a", "completion": ""},
        {"prompt": chat("a")["messages"], "completion": chat("a", "")["messages"][1:]},
    ],
)
def test_a_blank_answer_stops_with_its_place(row: dict[str, Any]) -> None:
    """It would train the model to end at once."""
    rows = data({"text": "a b"}, row)
    with pytest.raises(DataError, match="x: line 2: answer is blank, expected some text"):
        encode(rows, Words())


def test_blank_turns_that_are_not_trained_are_kept() -> None:
    marked = chat("a", "", "b", "c")
    marked["messages"][1]["weight"] = 0
    calls = chat("a", "")
    calls["messages"][1]["tool_calls"] = [{"name": "f"}]
    history = {
        "prompt": chat("a", "", "b")["messages"],
        "completion": chat("a", "b")["messages"][1:],
    }
    for row in (marked, calls, history):
        with pytest.raises(NotImplementedError):  # it goes on to be rendered
            encode(data(row), Words())
    prompt_only = data({"prompt": "a b", "completion": ""})
    assert encode(prompt_only, Words(), loss_on="all").num_trained == 2


def test_unknown_tokens_are_counted() -> None:
    found = encode(
        data({"text": "a unknown unknown"}, {"text": "a b"}, {"text": "unknown a"}), Words()
    )
    assert found.unknown == [2, 0, 1]
    assert found.unknown_text.startswith("3 tokens in 2 of 3 rows are unknown to the vocabulary")
    assert encode(data({"text": "a b"}), Words()).unknown_text == ""


def test_an_encoded_row_is_a_row() -> None:
    example = TrainExample((3, 4, 5), (False, True, False))
    rows = data(example.row())
    assert encode(rows, Words()).examples == [example]
    assert encode(rows, Words(), loss_on="all").examples[0].trained == (True,) * 3
