"""Utility of one completion against its reference, in [0, 1]; needs no library."""

import re
import unicodedata


def normalised(text: str) -> str:
    """Return the text in lower case, NFC, with runs of white space as one space.

    Example:
        >>> normalised(" Paint the\\n red car. ")
        'paint the red car.'
    """
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def exact_match(completion: str, reference: str) -> float:
    """Score 1.0 where both texts are the same after `normalised`, else 0.0.

    Example:
        >>> exact_match("Paint the red car. ", "paint the red car.")
        1.0
    """
    return float(normalised(completion) == normalised(reference))


def option_accuracy(completion: str, reference: str) -> float:
    """Score 1.0 where both texts open with the same option letter, else 0.0.

    A letter counts only as an option: alone, in brackets, or followed by ``)``, ``.`` or ``:``.

    Example:
        >>> option_accuracy("(C) With a machine", "c) with a machine")
        1.0
        >>> option_accuracy("a machine", "a) with bare hands")
        0.0
    """
    wanted = _option(reference)
    return float(wanted is not None and _option(completion) == wanted)


def _option(text: str) -> str | None:
    found = re.match(r"\(?([a-z])(?:[).:]|$)", normalised(text))
    return found[1] if found else None
