"""Shapes of published data sets, and the conversion of their rows to training rows.

A row that fits several shapes has the first of them in ``SHAPES``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from fastsafe.data.conversation import is_turns, kind_of, turns_of
from fastsafe.data.turns import check_row_marks, read_tools, read_turn, read_turns, unread_keys
from fastsafe.errors import DataError, UsageError, shown

Raw = Mapping[str, Any]


class RowShape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Name of the shape, for reports and errors.
        needs: Keys that every row must have.
        may: Keys that are used if a row has them.
        row: Converts a row to one of ``fastsafe.data.conversation``; takes the row and its
            location for errors.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    row: Callable[[Raw, str], dict[str, Any]]

    def fits(self, keys: Collection[str]) -> bool:
        """Return whether a row with these keys has this shape."""
        return all(key in keys for key in self.needs)


# Role of a turn by its speaker in ShareGPT.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def _keeping(*keys: str) -> Callable[[Raw, str], dict[str, Any]]:
    """Return a conversion to a row of these keys, which the raw row has, and of its tools."""

    def row(raw: Raw, location: str) -> dict[str, Any]:
        return _with_tools({key: _turns(raw[key], location, key) for key in keys}, raw, location)

    return row


def _turns(value: Any, location: str, key: str) -> Any:
    """Read the turns of a list; a value that is not a list of turns is left to `kind_of`."""
    return read_turns(value, location, key) if is_turns(value) else value


def _with_tools(row: dict[str, Any], raw: Raw, location: str) -> dict[str, Any]:
    """Add the raw row's tools to a row of turns.

    Raises:
        DataError: The row has tools and no turns, or the tools are malformed.
    """
    tools = read_tools(raw, location)
    if tools is None:
        return row
    if not is_turns(row.get("messages", row.get("prompt"))):
        raise DataError(
            f"{location}: tools are given beside plain text, expected turns, whose chat template "
            "prints them; write messages, or drop the tools"
        )
    return {**row, "tools": tools}


def _alpaca(raw: Raw, location: str) -> dict[str, Any]:
    """Convert a row of Alpaca (Taori et al. 2023), with LLaMA-Factory's history and system."""
    messages = _opening(raw)
    history = raw.get("history") or ()
    if not isinstance(history, list | tuple):
        raise DataError(f"{location}: history is not a list, expected pairs of question and answer")
    for exchange in history:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise DataError(
                f"{location}: history has {shown(exchange)}, expected pairs of question and answer"
            )
        messages += turns_of(*exchange)
    question = raw["instruction"]
    if raw.get("input"):
        question = (
            f"{_text(question, 'instruction', location)}\n{_text(raw['input'], 'input', location)}"
        )
    return {"messages": messages + turns_of(question, raw["output"])}


def _sharegpt(raw: Raw, location: str) -> dict[str, Any]:
    """Convert a row of ShareGPT; its turns may have role and content in place of from and value."""
    turns = raw["conversations"]
    if not isinstance(turns, list | tuple):
        raise DataError(f"{location}: conversations is {shown(turns)}, expected a list of turns")
    messages = _opening(raw)
    for i, turn in enumerate(turns):
        given = turn if isinstance(turn, Mapping) else {}
        speaker = given.get("from", given.get("role"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise DataError(
                f"{location}: conversations[{i}] is from {shown(speaker)}, expected one of "
                f"{', '.join(_SPEAKERS)}; rename it, or name the column of turns with role and "
                "content by --map messages=COLUMN"
            )
        content = given["value"] if given.get("value") is not None else given.get("content")
        named = {**given, "role": _SPEAKERS[speaker], "content": content}
        messages.append(read_turn(named, f"{location}: conversations[{i}]"))
    return _with_tools({"messages": messages}, raw, location)


def _summary(raw: Raw, location: str) -> dict[str, Any]:
    article = _text(raw["article"], "article", location)
    return {"messages": turns_of(f"Summarize the following text.\n\n{article}", raw["summary"])}


def _choices(answer_key: str) -> Callable[[Raw, str], dict[str, Any]]:
    def row(raw: Raw, location: str) -> dict[str, Any]:
        choices, answer = raw["choices"], raw[answer_key]
        is_list = isinstance(choices, list | tuple) and 2 <= len(choices) <= len(ascii_uppercase)
        if not is_list or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{location}: choices is {shown(choices)}, expected 2 to 26 texts")
        if isinstance(answer, int) and not isinstance(answer, bool):
            if not 0 <= answer < len(choices):
                raise DataError(
                    f"{location}: {answer_key} is {answer}, expected an index from 0 to "
                    f"{len(choices) - 1}"
                )
            answer = ascii_uppercase[answer]
        lines = [
            f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)
        ]
        question = _text(raw["question"], "question", location)
        return {"messages": turns_of("\n".join([question, *lines]), answer)}

    return row


def _question(raw: Raw, location: str) -> dict[str, Any]:
    question = _text(raw["question"], "question", location)
    if raw.get("context"):
        question = f"{_text(raw['context'], 'context', location)}\n\n{question}"
    return {"messages": turns_of(question, raw["answer"])}


def _tokens(raw: Raw, location: str) -> dict[str, Any]:
    return {key: raw[key] for key in ("token_ids", "trained")}


def _running_text(raw: Raw, location: str) -> dict[str, Any]:
    return {"text": raw["text"]}


def _opening(raw: Raw) -> list[dict[str, Any]]:
    return [{"role": "system", "content": raw["system"]}] if raw.get("system") else []


def _text(value: Any, key: str, location: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{location}: {key} is {shown(value)}, expected a string; write the text there"
        )
    return value


SHAPES = (
    RowShape("tokens", ("token_ids", "trained"), (), _tokens),
    RowShape("messages", ("messages",), ("tools",), _keeping("messages")),
    RowShape("sharegpt", ("conversations",), ("system", "tools"), _sharegpt),
    RowShape("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    RowShape(
        "prompt-completion", ("prompt", "completion"), ("tools",), _keeping("prompt", "completion")
    ),
    RowShape("summarization", ("article", "summary"), (), _summary),
    RowShape("multiple-choice", ("question", "choices", "solution"), (), _choices("solution")),
    RowShape("multiple-choice", ("question", "choices", "answer"), (), _choices("answer")),
    RowShape("question-answer", ("question", "answer"), ("context",), _question),
    RowShape("text", ("text",), (), _running_text),
)

# Roles that columns can be mapped to, with optional ones. user and assistant are turns of a chat;
# prompt and completion are texts without a chat template.
_TARGETS = {
    ("user", "assistant"): ("system",),
    ("prompt", "completion"): (),
    ("messages",): (),
    ("text",): (),
}


def shape_of(raw: Raw, location: str) -> RowShape:
    """Return the shape of a row, found by its keys.

    Raises:
        DataError: No known shape fits.
    """
    for shape in SHAPES:
        if shape.fits(raw):
            return shape
    known = "; ".join(f"{s.name} ({', '.join(s.needs)})" for s in SHAPES[1:])
    raise DataError(
        f"{location}: keys are {', '.join(map(str, raw))!a:.200}, expected one of: {known}; "
        "rename them, or map them with --map"
    )


def training_row(shape: RowShape, raw: Raw, location: str) -> dict[str, Any]:
    """Return a raw row of a shape as a checked training row.

    Raises:
        DataError: The row lacks a key of the shape, has a value of a wrong type, or has a key that
            changes what is trained in a way that is not supported.
    """
    if not shape.fits(raw):
        missing = ", ".join(key for key in shape.needs if key not in raw)
        raise DataError(
            f"{location}: {missing} is missing, expected a row of shape {shape.name} like the "
            "first one; correct or remove it"
        )
    check_row_marks(raw, location)
    row = shape.row(raw, location)
    kind_of(row, location)
    return row


def left_out(shape: RowShape, raw: Raw) -> list[str]:
    """Return the keys of a raw row, and of its turns as "messages[].id", that nothing reads."""
    keys = [key for key in raw if key not in (*shape.needs, *shape.may)]
    for name in shape.needs:
        if is_turns(raw[name]):
            more = ("from", "value") if shape.row is _sharegpt else ()
            turns = [turn for turn in raw[name] if isinstance(turn, Mapping)]
            keys += [f"{name}[].{key}" for turn in turns for key in unread_keys(turn, *more)]
    return list(dict.fromkeys(keys))


def mapped(mapping: Mapping[str, str]) -> RowShape:
    """Return the shape of rows whose keys are named by a mapping.

    Args:
        mapping: Key in the file for each role: user and assistant and optionally system, prompt
            and completion, messages, or text.

    Raises:
        UsageError: The roles are not one of these sets.
    """
    for needs, may in _TARGETS.items():
        if set(needs) <= set(mapping) <= {*needs, *may}:
            break
    else:
        sets = " | ".join(", ".join([*n, *(f"[{m}]" for m in may)]) for n, may in _TARGETS.items())
        raise UsageError(f"--map: it sets {', '.join(mapping) or 'nothing'}, expected {sets}")
    keys = tuple(mapping.values())

    def row(raw: Raw, location: str) -> dict[str, Any]:
        values = {role: raw[key] for role, key in mapping.items()}
        if "user" in values:
            return {"messages": _opening(values) + turns_of(values["user"], values["assistant"])}
        turns = {key: _turns(value, location, key) for key, value in values.items()}
        return _with_tools(turns, raw, location)

    return RowShape("mapped", keys, () if "user" in mapping else ("tools",), row)


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Parse roles and keys such as "prompt=question,completion=answer", in one string or several.

    Raises:
        UsageError: A part is not of the form ROLE=KEY, or a role is given twice.
    """
    mapping: dict[str, str] = {}
    for part in ",".join(pairs).split(","):
        role, equals, key = (word.strip() for word in part.partition("="))
        if not equals or not role or not key or role in mapping:
            raise UsageError(
                f"--map: {part!r} is not of the form ROLE=KEY, each role once, such as "
                "user=question,assistant=answer"
            )
        mapping[role] = key
    return mapping
