"""Row metrics: the utility of one completion against its reference, in [0, 1].

They read answers alone: what a model thinks before its answer is in no metric.
"""

import re
import unicodedata

from fastsafe.data.thoughts import answer_of

_EMPHASIS = re.compile(r"(?<!\w)[*_]+|[*_]+(?!\w)|`")  # of Markdown
_ANNOUNCED = re.compile(
    r"(?:so |thus,? |therefore,? )?(?:(?:the|my|final|correct|right|best) )*"
    r"(?:answer|option|choice)(?: is)?:? "
)


def folded(text: str) -> str:
    """Return a text in lower case, NFC, with runs of white space as one space.

    Example:
        >>> folded(" Paint the\\n red car. ")
        'paint the red car.'
    """
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def normalised(text: str) -> str:
    """Return the answer of a completion, folded."""
    return folded(answer_of(text))


def exact_match(completion: str, reference: str) -> float:
    """Score 1.0 where both texts are the same after `normalised`, else 0.0.

    Example:
        >>> exact_match("Paint the red car. ", "paint the red car.")
        1.0
    """
    return float(normalised(completion) == normalised(reference))


def option_accuracy(completion: str, reference: str) -> float:
    """Score 1.0 where both texts open with the same option letter, else 0.0.

    Example:
        >>> option_accuracy("(C) With a machine", "c) with a machine")
        1.0
        >>> option_accuracy("a machine", "a) with bare hands")
        0.0
    """
    answer = option(reference)
    return float(answer is not None and option(completion) == answer)


def answer_accuracy(completion: str, reference: str) -> float:
    """Score 1.0 where `yes_or_no` reads the same in both texts, else 0.0."""
    answer = yes_or_no(reference)
    return float(answer is not None and yes_or_no(completion) == answer)


def number_accuracy(completion: str, reference: str) -> float:
    """Score 1.0 where `final_number` reads the same in both texts, else 0.0."""
    answer = final_number(reference)
    return float(answer is not None and final_number(completion) == answer)


def option(text: str) -> str | None:
    """Return the option letter that a text opens with, in lower case; None without one.

    A letter is an option only alone on its line, in brackets, or before ``)``, ``.``, ``:``; behind
    an announcement such as "The answer is", also before ``,`` and ``because``. Emphasis is ignored.

    Example:
        >>> option("**(B)** a car"), option("The answer is C because ..."), option("A car")
        ('b', 'c', None)
    """
    line = _EMPHASIS.sub("", folded(answer_of(text).strip().partition("\n")[0])).strip()
    announced = _ANNOUNCED.match(line)
    # a comma before another letter is a list of options
    comma = r"|,(?! [a-z](?:[,.)]|$| and\b| or\b))"
    end = rf"[).:]{comma}| because\b|$" if announced else r"[).:]|$"
    letter = re.match(rf"\(?([a-z])(?:{end})", line[announced.end() :] if announced else line)
    return letter[1] if letter else None


def yes_or_no(text: str) -> str | None:
    """Return ``"yes"`` or ``"no"`` where the text opens with that word, or with true or false.

    An announcement before it, such as "The answer is", and emphasis are ignored.

    Example:
        >>> yes_or_no("True, it is."), yes_or_no("Answer: **no**"), yes_or_no("Nobody knows")
        ('yes', 'no', None)
    """
    opening = _EMPHASIS.sub("", normalised(text))
    if announced := _ANNOUNCED.match(opening):
        opening = opening[announced.end() :]
    word = re.match(r"(yes|true|no|false)\b", opening.lstrip("\"'( "))
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}[word[1]] if word else None


def final_number(text: str) -> str | None:
    """Return the number after the first ``####``, or the number that is the whole text.

    ``####`` is GSM8K's own mark. The text after that number is ignored, and no other number counts
    as the answer. Thousands commas, ``$``, emphasis, ``\\boxed`` and a trailing ``.0`` are dropped.

    Example:
        >>> final_number("3 * 400 = 1200\\n#### 1,200.00"), final_number("about 7")
        ('1200', None)
    """
    text = _EMPHASIS.sub("", answer_of(text)).replace("{,}", ",")
    number = r"\s*(?:\\boxed\{)?\\?\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)\}?\\?%?"
    match = re.search("####" + number, text) or re.fullmatch(number + r"\.?\s*", text)
    if not match:
        return None
    digits = match[1].replace(",", "")
    return re.sub(r"\.?0*$", "", digits) if "." in digits else digits
