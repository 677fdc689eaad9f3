"""Conversations, and the texts that defences add to them."""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

Messages = Sequence[Mapping[str, str]]  # each {"role", "content"}


def read_text(name: str) -> str:
    """Read a text of this package, without the newline at its end."""
    return files(__package__).joinpath("texts", f"{name}.txt").read_text("utf-8").rstrip("\n")


def with_system(messages: Messages, words: str) -> list[dict[str, str]]:
    """Return the conversation with ``words`` before its system prompt, or as its system prompt.

    Example:
        >>> with_system([{"role": "user", "content": "hello"}], "Be kind.")[0]
        {'role': 'system', 'content': 'Be kind.'}
    """
    rest = [dict(message) for message in messages]
    if rest and rest[0]["role"] == "system":
        rest[0]["content"] = f"{words}\n\n{rest[0]['content']}"
        return rest
    return [{"role": "system", "content": words}, *rest]


def system_prompt(name: str) -> Callable[..., list[dict[str, str]]]:
    """Return the ``apply`` of a defence that adds a system prompt, by default the named text."""

    def apply(messages: Messages, *, text: str | None) -> list[dict[str, str]]:
        return with_system(messages, read_text(name) if text is None else text)

    return apply
