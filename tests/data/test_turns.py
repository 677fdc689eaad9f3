"""Keys of turns that change what is trained are read under any name, or refused by name."""

from typing import Any

import pytest

from fastsafe.data.readers import read_rows
from fastsafe.data.turns import read_tools, read_turn
from fastsafe.errors import DataError
from fastsafe.io import chat_template

from .test_readers import write

CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **keys}


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ({"weight": 1, "name": None}, {}),
        ({"weight": 0}, {"weight": 0}),
        ({"weight": 0.0, "train": False}, {"weight": 0}),
        ({"masked": True}, {"weight": 0}),
        ({"masked": False, "loss": True}, {}),
        ({"thinking": "t"}, {"reasoning_content": "t"}),
        ({"reasoning": "t", "reasoning_content": "t"}, {"reasoning_content": "t"}),
        ({"tool_calls": [CALL], "content": None}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [{"name": "f"}]}, {"tool_calls": [{"name": "f"}]}),
        ({"tool_calls": [], "images": [], "function_call": None, "id": 7}, {}),
        ({"name": "n", "tool_call_id": "1"}, {"name": "n", "tool_call_id": "1"}),
    ],
)
def test_keys_that_are_read(keys: dict[str, Any], read: dict[str, Any]) -> None:
    found = read_turn(answer(**keys), "here")
    assert found == {"role": "assistant", "content": "a", **read}
    assert read_turn(found, "here") == found


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"weight": 0.5}, r"weight is 0\.5, expected 1 or true .* other weights are not supported"),
        ({"weight": "0"}, "weight is '0'"),
        ({"loss": [1]}, r"loss is \[1\]"),
        ({"weight": 0, "train": True}, "weight and train contradict each other"),
        ({"role": "user", "train": True}, "train asks to train a turn of role 'user'"),
        ({"mask": 0}, "key mask is 0, which is not supported; mark answers .* by weight 0"),
        ({"loss_mask": [0, 1]}, r"key loss_mask is \[0, 1\]"),
        ({"function_call": {"name": "f"}}, "key function_call .* write it as tool_calls"),
        ({"images": ["x.png"]}, "key images .* only text can be trained"),
        ({"refusal": "No."}, "key refusal"),
        ({"thinking": 5}, "thinking is 5, expected a string"),
        ({"thinking": "t", "reasoning": "u"}, "thinking and reasoning differ"),
        ({"tool_calls": "f()"}, r"tool_calls is 'f\(\)' of role 'assistant', expected the ass"),
        ({"tool_calls": [{"function": {}}]}, "each with the name of a function"),
        ({"tool_calls": [{"name": "f", "arguments": {1j}}]}, r"tool_calls is \[{'arguments': {1j}"),
        ({"role": "user", "tool_calls": [CALL]}, r"tool_calls is \[{'function'.* of role 'user'"),
        ({"name": 7}, "name is 7, expected a string"),
    ],
)
def test_keys_that_are_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{why}"):
        read_turn(answer(**keys), "here")


@pytest.mark.parametrize("tools", [None, "", "  ", [], "[]"])
def test_no_tools(tools: Any) -> None:
    assert read_tools({"tools": tools}, "here") is None


@pytest.mark.parametrize("tools", ["{", "[1]", 5, [5], {"name": "f"}, [{"d": 1j}], "[" * 99_999])
def test_tools_that_are_refused(tools: Any) -> None:
    with pytest.raises(DataError, match=r"^here: tools is .*, expected a list of functions"):
        read_tools({"tools": tools}, "here")


def test_reasoning_has_the_names_that_generation_reads() -> None:
    for name in chat_template._REASONING:
        assert read_turn(answer(**{name: "t"}), "here")["reasoning_content"] == "t"


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_every_shape_of_turns_reads_the_same_keys(tmp_path: Any, key: str) -> None:
    role, content = ("role", "content") if key == "messages" else ("from", "value")
    question, reply = ("user", "assistant") if key == "messages" else ("human", "gpt")
    raw = {
        key: [
            {role: question, content: "q", "id": 1},
            {role: reply, content: "a", "weight": 0, "thinking": "t", "model": "m"},
        ],
        "tools": '[{"name": "f"}]',
        "source": "web",
    }
    found = read_rows(write(tmp_path, raw))
    second = {"role": "assistant", "content": "a", "reasoning_content": "t", "weight": 0}
    assert found.rows == [
        {"messages": [{"role": "user", "content": "q"}, second], "tools": [{"name": "f"}]}
    ]
    assert found.left_out == ("source", f"{key}[].id", f"{key}[].model")


def test_turns_with_roles_under_conversations(tmp_path: Any) -> None:
    turns = [{"role": "user", "content": "q"}, answer()]
    assert read_rows(write(tmp_path, {"conversations": turns})).rows == [{"messages": turns}]
    mapped = read_rows(
        write(tmp_path, {"conversations": turns}), mapping={"messages": "conversations"}
    )
    assert mapped.rows == [{"messages": turns}]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"weight": 0}, "weight of the row is 0, and rows have no weights"),
        ({"weight": "0.5"}, "weight of the row is '0.5'"),
        ({"train": False}, "train of the row is False"),
        ({"masked": True}, "masked of the row is True"),
        ({"tools": [{"name": "f"}]}, "tools are given beside plain text"),
    ],
)
def test_marks_and_tools_of_rows_that_are_refused(tmp_path: Any, keys: Any, why: str) -> None:
    with pytest.raises(DataError, match=f"row 0, line 1: {why}"):
        read_rows(write(tmp_path, {"prompt": "p", "completion": "c", **keys}))
    kept = {"weight": 1, "train": True, "loss": 0.25, "masked": False}
    assert len(read_rows(write(tmp_path, {"prompt": "p", "completion": "c", **kept})).rows) == 1
