"""Prompt styles: the model's chat template, Alpaca's headings, or plain text.

Jan et al. 2024 fine-tune the same rows once in the model's own chat format and once in Alpaca's, so
the style is an experimental variable. Their Alpaca wording is not released; ours has its headings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastsafe.data.conversation import Row
from fastsafe.errors import UsageError, nearest
from fastsafe.safety.mixing.learned_style import styles

STYLES: Mapping[str, str] = {
    "native": "the checkpoint's chat template",
    "alpaca": "an instruction and a response under headings, as text",
    "plain": "the request and the answer as running text",
}


def styled(messages: Sequence[Mapping[str, Any]], style: str) -> Row:
    """Return one conversation as a training row in a style.

    Args:
        messages: Turns; the first may be a system turn, the last is the answer.
        style: Id of a style; "native" leaves the conversation to the chat template.

    Raises:
        UsageError: The style is unknown, or the conversation has more than one question.

    Example:
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        >>> styled(turns, "plain")
        {'prompt': 'Hi\\n', 'completion': 'Ho'}
    """
    if style == "native":
        return {"messages": list(messages)}
    return {"prompt": prompt_text(messages[:-1], style), "completion": messages[-1]["content"]}


def prompt_text(messages: Sequence[Mapping[str, Any]], style: str) -> str:
    """Return the prompt of a conversation as text, in a style without a chat template.

    The system turn precedes the request, with a blank line between them.

    Raises:
        UsageError: The style is unknown or "native", or there is more than one question.
    """
    *before, last = messages
    if [m["role"] for m in before] not in ([], ["system"]) or last["role"] != "user":
        roles = ", ".join(m["role"] for m in messages)
        raise UsageError(
            f"style {style}: the turns are {roles}, expected one question, a system turn before it "
            "or not; use style native for conversations"
        )
    request = "\n\n".join(m["content"] for m in messages)
    if style == "alpaca":
        alpaca = next(known for known in styles() if known.id == "alpaca")
        return f"{alpaca.prefix}{request}{alpaca.suffix}"
    if style == "plain":
        return f"{request}\n"
    text_styles = [name for name in STYLES if name != "native"]
    raise UsageError(f"style {style!r} has no text of its own; {nearest(style, text_styles)}")
