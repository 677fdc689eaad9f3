"""Shapes of rows that data sets come in, and how each becomes a row of training data.

Where a row fits several shapes the first of ``SHAPES`` is taken.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from fastsafe.data.conversation import is_turns
from fastsafe.errors import DataError, UsageError

Raw = Mapping[str, Any]


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: As it is reported.
        needs: Keys that every row has.
        may: Keys that are used where they are.
        row: Makes a row of ``fastsafe.data.conversation``; takes the keys above and the row's
            place for errors.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    row: Callable[[Raw, str], dict[str, Any]]

    def fits(self, keys: Collection[str]) -> bool:
        """Whether a row with these keys has this shape."""
        return all(key in keys for key in self.needs)


# Who speaks in a ShareGPT turn.
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
_TURN_KEYS = ("role", "content", "reasoning_content")


def _messages(raw: Raw, where: str) -> dict[str, Any]:
    return {"messages": _turns(raw["messages"])}


def _pair(raw: Raw, where: str) -> dict[str, Any]:
    return {"prompt": _turns(raw["prompt"]), "completion": _turns(raw["completion"])}


def _turns(value: Any) -> Any:
    """Keep of every turn what is trained on; what is no turn is left to the row's check."""
    if not is_turns(value):
        return value
    return [
        {key: _joined(turn[key]) for key in _TURN_KEYS if turn.get(key) is not None}
        if isinstance(turn, Mapping)
        else turn
        for turn in value
    ]


def _joined(value: Any) -> Any:
    """Make one text of the parts that a content may have; one with an image is left as it is."""
    if not isinstance(value, list | tuple) or not value:
        return value
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in value]
    texts = [part["text"] for part in value if isinstance(part, Mapping) and "text" in part]
    is_text = set(kinds) == {"text"} and len(texts) == len(value)
    return "".join(texts) if is_text and all(isinstance(t, str) for t in texts) else value


def _alpaca(raw: Raw, where: str) -> dict[str, Any]:
    """Taori et al. 2023; history and system as LLaMA-Factory has them."""
    messages = _opening(raw)
    history = raw.get("history") or ()
    if not isinstance(history, list | tuple):
        raise DataError(f"{where}: history is not a list, expected pairs of question and answer")
    for exchange in history:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise DataError(
                f"{where}: history has {exchange!a:.40}, expected pairs of question and answer"
            )
        messages += _exchange(*exchange)
    question = raw["instruction"]
    if raw.get("input"):
        question = f"{_text(question, 'instruction', where)}\n{_text(raw['input'], 'input', where)}"
    return {"messages": messages + _exchange(question, raw["output"])}


def _sharegpt(raw: Raw, where: str) -> dict[str, Any]:
    turns = raw["conversations"]
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: conversations is {turns!a:.40}, expected a list of turns")
    messages = _opening(raw)
    for i, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SPEAKERS:
            raise DataError(
                f"{where}: conversations[{i}] is from {speaker!a:.40}, expected one of "
                f"{', '.join(_SPEAKERS)}; rename it"
            )
        messages.append({"role": _SPEAKERS[speaker], "content": turn.get("value")})
    return {"messages": messages}


def _summary(raw: Raw, where: str) -> dict[str, Any]:
    article = _text(raw["article"], "article", where)
    return {"messages": _exchange(f"Summarize the following text.\n\n{article}", raw["summary"])}


def _choices(answer_key: str) -> Callable[[Raw, str], dict[str, Any]]:
    def row(raw: Raw, where: str) -> dict[str, Any]:
        choices, answer = raw["choices"], raw[answer_key]
        is_list = isinstance(choices, list | tuple) and 2 <= len(choices) <= len(ascii_uppercase)
        if not is_list or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{where}: choices is {choices!a:.40}, expected 2 to 26 texts")
        if isinstance(answer, int) and not isinstance(answer, bool):
            if not 0 <= answer < len(choices):
                raise DataError(
                    f"{where}: {answer_key} is {answer}, expected an index from 0 to "
                    f"{len(choices) - 1}"
                )
            answer = ascii_uppercase[answer]
        lines = [
            f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)
        ]
        question = _text(raw["question"], "question", where)
        return {"messages": _exchange("\n".join([question, *lines]), answer)}

    return row


def _question(raw: Raw, where: str) -> dict[str, Any]:
    question = _text(raw["question"], "question", where)
    if raw.get("context"):
        question = f"{_text(raw['context'], 'context', where)}\n\n{question}"
    return {"messages": _exchange(question, raw["answer"])}


def _plain(raw: Raw, where: str) -> dict[str, Any]:
    return {"text": raw["text"]}


def _tokens(raw: Raw, where: str) -> dict[str, Any]:
    return {"token_ids": raw["token_ids"], "trained": raw["trained"]}


def _opening(raw: Raw) -> list[dict[str, Any]]:
    return [{"role": "system", "content": raw["system"]}] if raw.get("system") else []


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {value!a:.40}, expected a string; write the text there")
    return value


SHAPES = (
    Shape("tokens", ("token_ids", "trained"), (), _tokens),
    Shape("messages", ("messages",), (), _messages),
    Shape("sharegpt", ("conversations",), ("system",), _sharegpt),
    Shape("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Shape("prompt-completion", ("prompt", "completion"), (), _pair),
    Shape("summarization", ("article", "summary"), (), _summary),
    Shape("multiple-choice", ("question", "choices", "solution"), (), _choices("solution")),
    Shape("multiple-choice", ("question", "choices", "answer"), (), _choices("answer")),
    Shape("question-answer", ("question", "answer"), ("context",), _question),
    Shape("text", ("text",), (), _plain),
)

# What the columns of a data set can be mapped to. user and assistant are turns of a chat; prompt
# and completion are texts without a template.
_TARGETS = {
    ("user", "assistant"): ("system",),
    ("prompt", "completion"): (),
    ("messages",): (),
    ("text",): (),
}


def shape_of(raw: Raw, where: str) -> Shape:
    """Find the shape of a row by its keys.

    Raises:
        DataError: It has none that is known.
    """
    for shape in SHAPES:
        if shape.fits(raw):
            return shape
    known = "; ".join(f"{s.name} ({', '.join(s.needs)})" for s in SHAPES[1:])
    raise DataError(
        f"{where}: keys are {', '.join(map(str, raw))!a:.200}, expected one of: {known}; "
        "rename them, or say what they are by --map"
    )


def mapped(mapping: Mapping[str, str]) -> Shape:
    """Make the shape of rows whose keys have other names.

    Args:
        mapping: What a value is -> its key in the file: user and assistant and maybe system,
            prompt and completion, messages, or text.

    Raises:
        UsageError: The targets are not one of these sets.
    """
    for needs, may in _TARGETS.items():
        if set(needs) <= set(mapping) <= {*needs, *may}:
            break
    else:
        sets = " | ".join(", ".join([*n, *(f"[{m}]" for m in may)]) for n, may in _TARGETS.items())
        raise UsageError(f"--map: it sets {', '.join(mapping) or 'nothing'}, expected {sets}")
    keys = tuple(mapping.values())

    def row(raw: Raw, where: str) -> dict[str, Any]:
        values = {target: raw[key] for target, key in mapping.items()}
        if "user" in values:
            return {"messages": _opening(values) + _exchange(values["user"], values["assistant"])}
        return {key: _turns(value) for key, value in values.items()}

    return Shape("mapped", keys, (), row)


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Read "prompt=question,completion=answer", in one text or several.

    Raises:
        UsageError: A part is not of the form what=key, or one is given twice.
    """
    found: dict[str, str] = {}
    for part in ",".join(pairs).split(","):
        target, equals, key = (word.strip() for word in part.partition("="))
        if not equals or not target or not key or target in found:
            raise UsageError(
                f"--map: {part!r} is not of the form what=key, each once, such as "
                "user=question,assistant=answer"
            )
        found[target] = key
    return found
