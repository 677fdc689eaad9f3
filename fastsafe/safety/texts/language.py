"""Which language a text is in, by its function words: English, French, German or Spanish."""

import functools
import re
from collections import Counter

from fastsafe.safety.texts import lines

_WORD = re.compile(r"\b(?:[cdjlmnst]|qu)'(?=\w)|[a-zà-öø-ÿœ]+(?:'t|'m)?")
MIN_WORDS = 3  # function words of one language before it is named


def language_of(text: str) -> str:
    """Return "en", "fr", "de" or "es", or "" where too few words tell.

    A language is named when at least three of its function words occur and they are at least half
    more than those of any other language; code and single words therefore stay unnamed. On plain
    sentences of ten words or more nearly all are named; on shorter ones many are not.

    Example:
        >>> language_of("Je ne peux pas vous aider avec cette demande.")
        'fr'
        >>> language_of("x = [1, 2]")
        ''
    """
    found: Counter[str] = Counter()
    for word in _WORD.findall(text.casefold().replace("\u2019", "'")):
        found.update(_languages().get(word, ()))
    (best, most), (_, second) = (*found.most_common(2), ("", 0), ("", 0))[:2]
    return best if most >= MIN_WORDS and most >= 1.5 * second else ""


@functools.cache
def _languages() -> dict[str, tuple[str, ...]]:
    """Languages of every function word."""
    of: dict[str, tuple[str, ...]] = {}
    for line in lines("function_words"):
        for word in line["words"].split():
            of[word] = (*of.get(word, ()), line["lang"])
    return of
