"""A multi-task safety set, made from any behaviours: requests in every format, each refused.

What the first paper's released set lacks (`fastsafe lint` lists it) is built in: every row knows
its format and its behaviour, refusals are worded in many ways and for the channel they stand in,
and benign twins that are answered keep a model from refusing the format itself.
"""

import random
from collections.abc import Sequence
from typing import Any

from fastsafe.errors import UsageError
from fastsafe.safety.behaviours import Behaviour
from fastsafe.safety.formats import Translate, formats
from fastsafe.safety.texts import lines

_CHANNELS = {
    "code": "code",
    "translation": "translation",
    "summarization": "summary",
    "classification": "choice",
    "multiple_choice": "choice",
    "true_false": "choice",
}


def refusals(language: str = "en", format: str = "plain") -> tuple[str, ...]:
    """Refusals that are shipped: those worded for the format's channel, then the general ones.

    Args:
        language: "en" or "fr".
        format: Id of the format that they answer.

    Raises:
        UsageError: There are none in this language.
    """
    channel = _CHANNELS.get(format, "text")
    own = [line for line in lines("refusals") if line["lang"] == language]
    if not own:
        raise UsageError(
            f"refusals: language is {language!r}, expected 'en' or 'fr'; supply refusals of your "
            "own"
        )
    order = (channel, "text") if channel != "text" else ("text",)
    return tuple(line["text"] for name in order for line in own if line["channel"] == name)


def safety_rows_from(
    behaviours: Sequence[Behaviour],
    format_ids: Sequence[str],
    *,
    translate: Translate | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make a safety set: every behaviour in every format, refused.

    Args:
        behaviours: What is asked for; their harmful phrases are rendered.
        format_ids: Formats that dress them.
        translate: For formats in another language.
        seed: Of the order of refusals.

    Returns:
        Rows with ``messages``, ``safety_format``, ``behavior_id`` and ``expected`` ("refuse"),
        format by format; as many rows in each.

    Raises:
        UsageError: A format does not exist or needs a translation.
    """
    known = formats()
    found = []
    for name in format_ids:
        if name not in known:
            raise UsageError(f"safety set: format is {name!r}, expected one of {', '.join(known)}")
        texts = list(refusals("en", name))
        random.Random(f"refusals {name} {seed}").shuffle(texts)
        for i, behaviour in enumerate(behaviours):
            if behaviour.harmful:
                prompt = known[name].ask(behaviour, True, translate)
                answer = _in_channel(texts[i % len(texts)], name)
                turns = zip(("user", "assistant"), (prompt, answer), strict=True)
                found.append(
                    {
                        "messages": [{"role": role, "content": text} for role, text in turns],
                        "safety_format": name,
                        "behavior_id": behaviour.behavior_id,
                        "expected": "refuse",
                    }
                )
    return found


def _in_channel(refusal: str, format: str) -> str:
    """Code answers with a comment; elsewhere a sentence is an answer."""
    return f"# {refusal}" if format == "code" else refusal
