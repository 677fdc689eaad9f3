"""Language identification by function words: English, French, German or Spanish."""

import functools
import re
from collections import Counter

from fastsafe.safety.texts import lines

_WORD = re.compile(r"\b(?:[cdjlmnst]|qu)'(?=\w)|[a-zà-öø-ÿœ]+(?:'t|'m)?")
MIN_WORDS = 3  # function words that identify a language


def language_of(text: str) -> str:
    """Return the language of a text: "en", "fr", "de", "es", or "" where it is not identified.

    A language is identified by at least three of its function words, and 1.5 times as many as of
    any other language, so that code and single words have none. Nearly all plain sentences of ten
    words or more are identified; many shorter ones are not.

    Example:
        >>> language_of("Je ne peux pas vous aider avec cette demande.")
        'fr'
        >>> language_of("x = [1, 2]")
        ''
    """
    counts: Counter[str] = Counter()
    for word in _WORD.findall(text.casefold().replace("\u2019", "'")):
        counts.update(_languages().get(word, ()))
    if not counts:
        return ""
    (best, count), *others = counts.most_common(2)
    runner_up = others[0][1] if others else 0
    return best if count >= MIN_WORDS and count >= 1.5 * runner_up else ""


@functools.cache
def _languages() -> dict[str, tuple[str, ...]]:
    """Return the languages of every function word."""
    languages: dict[str, tuple[str, ...]] = {}
    for line in lines("function_words"):
        for word in line["words"].split():
            languages[word] = (*languages.get(word, ()), line["lang"])
    return languages
