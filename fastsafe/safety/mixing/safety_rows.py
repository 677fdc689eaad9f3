"""A multi-task safety set from any behaviours: their requests in every format, each refused.

It avoids the flaws of the first paper's released set, which `fastsafe lint` lists: every row names
its format and its behaviour, and refusals have many wordings that fit the channel of the answer.
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
    """Return the shipped refusals: those for the format's channel, then the general ones.

    Args:
        language: "en" or "fr".
        format: Id of the format of the request.

    Raises:
        UsageError: No refusal is shipped in this language.
    """
    shipped = [line for line in lines("refusals") if line["lang"] == language]
    if not shipped:
        raise UsageError(
            f"refusals: language is {language!r}, expected 'en' or 'fr'; supply refusals of your "
            "own"
        )
    order = (_CHANNELS.get(format), "text")
    return tuple(line["text"] for name in order for line in shipped if line["channel"] == name)


def safety_rows_from(
    behaviours: Sequence[Behaviour],
    format_ids: Sequence[str],
    *,
    translate: Translate | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a safety set: every behaviour in every format, refused.

    Args:
        behaviours: Behaviours; those without a harmful text are skipped.
        format_ids: Formats of the requests.
        translate: For formats in another language.
        seed: Of the order of refusals.

    Returns:
        Rows with ``messages``, ``safety_format``, ``behavior_id`` and ``expected`` ("refuse"),
        format by format; as many rows in each.

    Raises:
        UsageError: A format does not exist or needs a translation.
    """
    known = formats()
    rows = []
    for name in format_ids:
        if name not in known:
            raise UsageError(f"safety set: format is {name!r}, expected one of {', '.join(known)}")
        texts = list(refusals("en", name))
        random.Random(f"refusals {name} {seed}").shuffle(texts)
        for i, behaviour in enumerate(behaviours):
            if behaviour.harmful:
                prompt = known[name].ask(behaviour, True, translate)
                answer = _in_channel(texts[i % len(texts)], name)
                rows.append(
                    {
                        "messages": [
                            {"role": "user", "content": prompt},
                            {"role": "assistant", "content": answer},
                        ],
                        "safety_format": name,
                        "behavior_id": behaviour.behavior_id,
                        "expected": "refuse",
                    }
                )
    return rows


def _in_channel(refusal: str, format: str) -> str:
    """Return the refusal as an answer in the format: a comment for code, else the sentence."""
    return f"# {refusal}" if format == "code" else refusal
