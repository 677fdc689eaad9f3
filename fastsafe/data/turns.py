"""The keys of a turn and of its row: which ones are read, and which are refused by name.

A key that changes what is trained is rendered, respected or refused, whatever its data set calls
it; other keys change nothing, and `unread_keys` names them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastsafe.errors import DataError, shown

_REASONING = ("reasoning_content", "thinking", "reasoning")
# marks of whether an answer is trained, as in OpenAI's, Mistral's, Axolotl's and ms-swift's rows
_MARKS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
_INVERSE_MARKS = ("masked",)  # torchtune's
_TEXTS = ("tool_call_id", "name")
_READ = ("role", "content", "tool_calls", *_TEXTS, *_REASONING, *_MARKS, *_INVERSE_MARKS)

_REFUSED = {
    "function_call": "write it as tool_calls",
    "functions": "write them as the row's tools",
    "tools": "move them to the row's own key tools",
    "documents": "write them into the content",
    "refusal": "write it as the content",
    **dict.fromkeys(
        ("mask", "loss_mask", "loss_scale", "train_detail"),
        "mark answers that are not to be trained by weight 0 instead",
    ),
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos"),
        "drop the row, as only text can be trained",
    ),
}
_EMPTY: tuple[Any, ...] = ("", [], {}, ())


def read_turn(turn: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return a turn with the keys that encoding reads, under one name each.

    Args:
        turn: A turn with role and content. Reasoning under any of its three names becomes
            ``reasoning_content``; a mark such as ``train: false`` becomes ``weight`` 0. Text parts
            of a content are joined. Keys whose value is None are as if they were not there.
        location: Prefix of errors, with the place of the turn.

    Raises:
        DataError: A key changes what is trained in a way that is not supported, or its value has a
            wrong type.
    """
    given = {key: value for key, value in turn.items() if value is not None}
    for key, remedy in _REFUSED.items():
        if key in given and given[key] not in _EMPTY:
            raise DataError(
                f"{location}: key {key} is {shown(given[key])}, which is not supported; {remedy}"
            )
    read = {key: given[key] for key in ("role",) if key in given}
    if "content" in given:
        read["content"] = _joined(given["content"])
    if reasoning := _reasoning(given, location):
        read["reasoning_content"] = next(iter(reasoning.values()))
    if given.get("tool_calls"):
        read["tool_calls"] = _tool_calls(given, location)
        read.setdefault("content", "")
    for key in _TEXTS:
        if key in given:
            if not isinstance(given[key], str):
                raise DataError(f"{location}: {key} is {shown(given[key])}, expected a string")
            read[key] = given[key]
    if not _is_trained(given, location):
        read["weight"] = 0
    return read


def read_turns(turns: Sequence[Any], location: str, key: str = "messages") -> list[Any]:
    """Return turns with the keys that encoding reads; what is no turn is left to `kind_of`."""
    return [
        read_turn(turn, f"{location}: {key}[{i}]") if isinstance(turn, Mapping) else turn
        for i, turn in enumerate(turns)
    ]


def unread_keys(turn: Mapping[str, Any], *more: str) -> list[str]:
    """Return the keys of a turn that nothing reads; ``more`` are read, too."""
    return [key for key, value in turn.items() if value is not None and key not in (*_READ, *more)]


def read_tools(row: Mapping[str, Any], location: str) -> list[Any] | None:
    """Return the functions in a row's key tools, None without any.

    Raises:
        DataError: They are no list of objects, also not as JSON in a string.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(
                f"{location}: tools is {shown(tools)}, expected a list of functions, or JSON of "
                "one; correct or drop it"
            ) from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    is_list = isinstance(tools, list | tuple) and all(isinstance(each, Mapping) for each in tools)
    if not is_list or not _is_json(tools):
        raise DataError(
            f"{location}: tools is {shown(tools)}, expected a list of functions, or JSON of one;"
            " correct or drop it"
        )
    return list(tools)


def check_row_marks(row: Mapping[str, Any], location: str) -> None:
    """Refuse marks beside the turns that give the whole row another weight than 1.

    Raises:
        DataError: There is such a mark.
    """
    for key in (*_MARKS, *_INVERSE_MARKS):
        value = row.get(key)
        word = str(value).lower() if isinstance(value, bool | int | float | str) else ""
        is_mark = word in ("true", "false") or (word and "weight" in key)
        if is_mark and word not in (("false",) if key in _INVERSE_MARKS else ("true", "1", "1.0")):
            raise DataError(
                f"{location}: {key} of the row is {shown(value)}, and rows have no weights here;"
                " remove rows that are not to be trained, or drop the key"
            )


def name_of(function: Mapping[str, Any]) -> str:
    """Return the name of a tool or tool call, "" without one."""
    inner = function.get("function")
    name = (inner if isinstance(inner, Mapping) else function).get("name")
    return name if isinstance(name, str) else ""


def _reasoning(given: Mapping[str, Any], location: str) -> dict[str, str]:
    found = {key: given[key] for key in _REASONING if key in given}
    for key, text in found.items():
        if not isinstance(text, str):
            raise DataError(f"{location}: {key} is {shown(text)}, expected a string")
    if len(set(found.values())) > 1:
        raise DataError(
            f"{location}: {' and '.join(found)} differ, expected one text of reasoning; drop one"
        )
    return found


def _tool_calls(given: Mapping[str, Any], location: str) -> list[Any]:
    calls = given["tool_calls"]
    is_list = isinstance(calls, list | tuple) and all(isinstance(each, Mapping) for each in calls)
    is_list = is_list and all(map(name_of, calls)) and _is_json(calls)
    if given.get("role") != "assistant" or not is_list:
        raise DataError(
            f"{location}: tool_calls is {shown(calls)} of role {shown(given.get('role'))}, "
            "expected the assistant's list of calls, each with the name of a function; correct or "
            "drop it"
        )
    return list(calls)


def _is_json(value: Any) -> bool:
    """Return whether JSON can hold a value, which the template and a file of rows need."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_trained(given: Mapping[str, Any], location: str) -> bool:
    """Return whether the marks of a turn leave it trained; of another role, it never is."""
    is_answer = given.get("role") == "assistant"
    marks = {}
    for key in (*_MARKS, *_INVERSE_MARKS):
        if key not in given:
            continue
        value = given[key]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{location}: {key} is {shown(value)}, expected 1 or true to train the answer, "
                "0 or false to leave it untrained; other weights are not supported"
            )
        marks[key] = bool(value) != (key in _INVERSE_MARKS)
    if len(set(marks.values())) > 1:
        raise DataError(f"{location}: {' and '.join(marks)} contradict each other; drop one")
    wanted = next(iter(marks.values()), is_answer)
    if wanted and not is_answer:
        raise DataError(
            f"{location}: {next(iter(marks))} asks to train a turn of role "
            f"{shown(given.get('role'))}, expected the assistant's alone to be trained; drop the"
            " mark, or train all tokens with loss_on all"
        )
    return wanted or not is_answer


def _joined(value: Any) -> Any:
    """Join the text parts of a content; content with other parts, such as images, is unchanged."""
    if not isinstance(value, list | tuple) or not value:
        return value
    texts = [
        part.get("text")
        for part in value
        if isinstance(part, Mapping) and part.get("type") == "text"
    ]
    is_text = len(texts) == len(value) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if is_text else value
