"""A header or JSON never becomes a prompt, in whatever form a list is copied."""

import json
from pathlib import Path

import pytest

from fastsafe.data.prompt_lists import PROMPT_COLUMNS, read_prompts
from fastsafe.errors import DataError

PROMPTS = ["placeholder request 1", "placeholder request 2"]


def texts(folder: Path, name: str, content: str) -> list[str]:
    path = folder / name
    path.write_bytes(content.encode())
    return [prompt.text for prompt in read_prompts(path)]


@pytest.mark.parametrize("header", [*PROMPT_COLUMNS, "Goals", "Behavior", "Harmful Behaviors"])
def test_every_known_header_is_a_header(tmp_path: Path, header: str) -> None:
    lines = "\n".join(PROMPTS)
    assert texts(tmp_path, "x.csv", f"{header}\n{lines}\n") == PROMPTS
    assert texts(tmp_path, "x.txt", f"{header}\n{lines}\n") == PROMPTS
    rows = "".join(json.dumps({"id": 1, header: prompt}) + "\n" for prompt in PROMPTS)
    for name in ("x.jsonl", "x.json"):
        assert texts(tmp_path, name, rows) == PROMPTS
    indexed = "".join(f"{i},{prompt}\n" for i, prompt in enumerate(PROMPTS))
    assert texts(tmp_path, "x.csv", f",{header}\n{indexed}") == PROMPTS
    assert texts(tmp_path, "x.csv", f"\ufeff,{header}\n{indexed}".replace("\n", "\r")) == PROMPTS
    assert texts(tmp_path, "x.tsv", f",{header}\n{indexed}".replace(",", "\t")) == PROMPTS


def test_a_list_without_a_header(tmp_path: Path) -> None:
    assert texts(tmp_path, "x.csv", "\n".join(PROMPTS)) == PROMPTS
    assert texts(tmp_path, "x.txt", 'ask "a, b\n\nask, c\n') == ['ask "a, b', "ask, c"]
    path = tmp_path / "x.csv"
    path.write_text("ask a, b\nask c\n")
    found = list(read_prompts(path, joins_fields=True))
    assert [prompt.text for prompt in found] == ["ask a, b", "ask c"]
    assert found[1].location == f"{path}: row 1, line 2"
    assert found[1].number == 2


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "x.csv",
            "sentence\nask a\n",
            "line 1: header is 'sentence', expected a prompt, or a head",
        ),
        ("x.csv", "a,b\nask a,x\n", "line 1: header is 'a, b', expected a prompt"),
        ("x.csv", "ask a\nask b, c\n", "line 2: fields are 2, expected 1"),
        (
            "x.csv",
            '"{""goal"": ""ask a""}"\n',
            "is JSON, expected plain text; call the file .jsonl",
        ),
        ("x.txt", '{"goal": "ask a"}\n', "is JSON, expected plain text"),
        ("x.txt", '["ask a"]\n', "is JSON"),
        ("x.jsonl", '{"sentence": "ask a"}\n', "keys are 'sentence', expected a text under one of"),
        ("x.jsonl", '{"goal": ""}\n', "keys are 'goal', expected a text"),
        ("x.jsonl", '{"goal": 5}\n', "keys are 'goal', expected a text"),
        ("x.txt", "\0", "NUL"),
    ],
)
def test_what_is_no_list_of_prompts(tmp_path: Path, name: str, content: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"x\.\w+: .*{why}"):
        texts(tmp_path, name, content)
