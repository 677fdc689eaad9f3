"""The four kinds of training rows, and the check of their keys and types."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from fastsafe.errors import DataError, shown

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["prompt", "messages", "text", "tokens"]

# {"prompt", "completion"}: both strings, both lists of turns, or both lists of token ids;
# {"messages"}: a conversation; {"text"}: running text; {"token_ids", "trained"}: an encoded row.
# Beside turns, "tools" lists the functions that the chat template prints. Other keys are kept and
# ignored.
Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")

_KEYS: dict[Kind, tuple[str, ...]] = {
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "tokens": ("token_ids", "trained"),
}


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[int]  # 0 for an answer that is not trained


def kind_of(row: Row, location: str) -> Kind:
    """Check the keys and types of a row and return its kind.

    Args:
        row: The row.
        location: Prefix of errors, such as "train.jsonl: line 3".

    Raises:
        DataError: The keys fit no kind or more than one, or a value has a wrong type.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{location}: row is {type(row).__name__}, expected an object with keys; write one per "
            "row"
        )
    kinds = [kind for kind, keys in _KEYS.items() if all(key in row for key in keys)]
    if len(kinds) != 1:
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(
            f"{location}: keys are {keys!a}, expected those of one kind: prompt and completion, "
            "messages, text, or token_ids and trained; rename or drop keys"
        )
    kind = kinds[0]
    if kind == "messages":
        _check_messages(row["messages"], location)
    elif kind == "text":
        _check_text(row["text"], "text", location)
    elif kind == "tokens":
        _check_tokens(row["token_ids"], row["trained"], location)
    else:
        _check_pair(row["prompt"], row["completion"], location)
    return kind


def _check_messages(messages: Any, location: str) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(
            f"{location}: messages is {shown(messages)}, expected a list of turns; "
            "give one turn or more"
        )
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else message
        if not isinstance(message, Mapping) or role not in ROLES:
            raise DataError(
                f"{location}: messages[{i}] has role {shown(role)}, expected one of "
                f"{', '.join(ROLES)}; rename it"
            )
        # OpenAI's turns that call tools have no content
        if message.get("content") is not None or not message.get("tool_calls"):
            _check_text(message.get("content"), f"messages[{i}].content", location)


def _check_text(value: Any, key: str, location: str) -> None:
    if not isinstance(value, str):
        raise DataError(
            f"{location}: {key} is {shown(value)}, expected a string; write the text there"
        )


def _check_pair(prompt: Any, completion: Any, location: str) -> None:
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    if is_turns(prompt) and is_turns(completion):
        _check_messages([*prompt, *completion], location)
        return
    if _are_ids(prompt) and _are_ids(completion):
        return
    # the wrong one of the two is the one of no known type, or else the completion
    is_known = isinstance(prompt, str) or is_turns(prompt) or _are_ids(prompt)
    key, value = ("completion", completion) if is_known else ("prompt", prompt)
    raise DataError(
        f"{location}: {key} is {shown(value)}, expected prompt and completion to be both "
        "strings, both lists of turns or both lists of token ids; write them alike"
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int for item in value)


def turns_of(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    """Return the user's turn with a prompt and the assistant's with its completion."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def is_turns(value: Any) -> bool:
    """Return whether a value is a list of turns; the turns are not checked."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def has_blank_answer(row: Row) -> bool:
    """Return whether a trained answer of a row is white space: it would train to end at once.

    Args:
        row: A checked row; answers in its prompt, or of weight 0, are not trained.
    """
    answers = row.get("messages", row.get("completion"))
    if isinstance(answers, str):
        return not answers.strip()
    turns = answers if isinstance(answers, list | tuple) else ()
    return any(
        turn["role"] == "assistant"
        and turn.get("weight") != 0
        and not turn.get("tool_calls")
        and not (turn["content"] + turn.get("reasoning_content", "")).strip()
        for turn in turns
        if isinstance(turn, Mapping)
    )


def _check_tokens(token_ids: Any, trained: Any, location: str) -> None:
    for key, value, kind in (("token_ids", token_ids, int), ("trained", trained, bool)):
        if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
            raise DataError(
                f"{location}: {key} is {shown(value)}, expected a list of {kind.__name__}; "
                "write one per token"
            )
    if len(token_ids) != len(trained):
        raise DataError(
            f"{location}: trained has {len(trained)} marks, expected {len(token_ids)}, one per "
            "token; write both equally long"
        )
