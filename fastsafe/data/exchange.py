"""The last request of a training row with its answer, read from and written to a row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastsafe.data.conversation import Kind, Row, is_turns, kind_of, turns_of
from fastsafe.errors import DataError


class Exchange(NamedTuple):
    """System text, last request and its answer; a part that a row lacks is ""."""

    system: str
    prompt: str
    answer: str


def exchange_of(row: Row, location: str) -> Exchange:
    """Return the last exchange of a row.

    Args:
        row: A conversation (its first system turn and its last user and assistant turns are
            taken), a prompt with its completion, or running text, which is the answer.
        location: Prefix of errors.

    Raises:
        DataError: The row is malformed, or a list of token ids.
    """
    kind = kind_of(row, location)
    if kind == "text":
        return Exchange("", "", row["text"])
    turns = row["messages"] if kind == "messages" else _turns(row)
    if turns is None:
        raise DataError(f"{location}: row is token ids, expected text; decode it first")
    # a turn that calls tools may have no content
    last = {turn["role"]: turn.get("content") or "" for turn in turns}
    system = next((turn["content"] for turn in turns if turn["role"] == "system"), "")
    return Exchange(system, last.get("user", ""), last.get("assistant", ""))


def _turns(row: Row) -> Any:
    """Return the turns of a prompt and its completion, None if they are token ids."""
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    if isinstance(prompt, str):
        return turns_of(prompt, completion)
    return [*prompt, *completion] if is_turns(prompt) else None


def as_row(exchange: Exchange, kind: Kind) -> dict[str, Any]:
    """Return a row of a kind; where the kind has no system turn, its text precedes the prompt.

    Raises:
        DataError: ``kind`` is running text, which has no place for a request.
    """
    if kind == "messages":
        turns = [{"role": "system", "content": exchange.system}] if exchange.system else []
        return {"messages": turns + turns_of(exchange.prompt, exchange.answer)}
    if kind == "prompt":
        prompt = "\n\n".join(filter(None, (exchange.system, exchange.prompt)))
        return {"prompt": prompt, "completion": exchange.answer}
    raise DataError("row is running text, which has no request; expected messages or a prompt")


def with_exchange(row: Row, exchange: Exchange) -> dict[str, Any]:
    """Return a copy of a row with its last exchange replaced; other turns and keys stay.

    Raises:
        DataError: As `as_row`.
    """
    replaced = as_row(exchange, kind_of(row, "row"))
    if "messages" not in row:
        return {**row, **replaced}
    turns: list[Mapping[str, Any]] = [t for t in row["messages"] if t["role"] != "system"]
    if exchange.system:
        turns.insert(0, {"role": "system", "content": exchange.system})
    texts = {"user": exchange.prompt, "assistant": exchange.answer}
    for role, text in texts.items():
        last = max((i for i, turn in enumerate(turns) if turn["role"] == role), default=None)
        if last is not None:
            turns[last] = {**turns[last], "content": text}
    return {**row, "messages": turns}
