"""Rules on labels and their balance: `language`, `balance`, `licence` (L5-L7, L9)."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fastsafe.safety.texts import lines
from fastsafe.safety.texts.language import language_of

from ._rows import Declared, LintFinding, LintRow, LintSet, words_of

MIN_SHARE = 0.8  # of the largest format's rows, for every other format
TELL_TALE_SHARE = 0.1  # of answers with one known phrase of generators
PHRASE_SHARE = 0.5  # of answers with one n-gram
PHRASE_WORDS = 4  # of such an n-gram
SAMPLE = 2000  # maximum number of answers searched for it
MIN_ANSWERS = 50  # fewer answers show no pattern

_TARGET = re.compile(
    r"\btranslat\w*\b[^\n]{0,120}?\b(?:in)?to (english|french|german|spanish)\b", re.I
)
_CODES = {"english": "en", "french": "fr", "german": "de", "spanish": "es"}
_OPTION = re.compile(r"^\s*[\[(]?(?:[A-Da-d]|[1-4])[\]).:]+\s+\S", re.M)
# sign that every prompt of a format must show; other formats have none
_SIGNS = {
    "classification": _OPTION,
    "multiple_choice": _OPTION,
    "translation": re.compile(r"transl|tradui|übersetz|traduc", re.I),
    "true_false": re.compile(r"true|vrai|wahr|verdad", re.I),
}
_NON_COMMERCIAL = re.compile(r"(?:^|[^a-z])nc(?:[^a-z]|$)|non-?\s?commercial", re.I)
_NOT_GRANTED = re.compile(r"gated|unknown|none|proprietary|all rights reserved|no licen[cs]e", re.I)


def languages(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find answers in another language than the declared one, or a translation's target.

    Function words identify the language (English, French, German, Spanish). Recall: nearly all
    sentences of ten words or more; code and shorter sentences have no language.
    """
    safety = {item.number for item in rows.safety}
    for item in rows.items:
        allowed = {item.label("lang", "language") or declared.language} - {""}
        target = _TARGET.search(item.exchange.prompt)
        if target and not allowed:
            allowed = {_CODES[target[1].lower()]}
            # a refusal may also be in the language of the request around the text
            allowed |= {"en"} if item.number in safety else set()
        language = language_of(item.exchange.answer) if allowed else ""
        if language and language not in allowed:
            detail = f"the answer is in {language}, expected {' or '.join(sorted(allowed))}"
            yield LintFinding("language", item.number, detail, item.exchange.answer)


def balance(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find formats with too few safety rows, wrong or missing labels, and shortcut phrases."""
    formats = {item.number: item.format(declared) for item in rows.safety}
    counts = Counter(name for name in formats.values() if name)
    largest = max(counts.values(), default=0)
    for name, n in counts.items():
        if n + 1 < MIN_SHARE * largest:  # one row more or less is rounding
            row = next(i for i, format in formats.items() if format == name)
            detail = f"format {name} has {n} safety rows, another has {largest}"
            yield LintFinding("balance", row, detail)
    for item in rows.safety:
        name = formats[item.number]
        if counts and not name:
            yield LintFinding("balance", item.number, "the row has no format, others have one")
        if name in _SIGNS and not _SIGNS[name].search(item.exchange.prompt):
            detail = f"the row is labelled {name}, and its prompt shows no sign of that"
            yield LintFinding("balance", item.number, detail, item.exchange.prompt)
    yield from _shortcuts(rows.safety)


def _shortcuts(items: Sequence[LintRow]) -> Iterator[LintFinding]:
    """Find phrases in so many refusals that a model may learn the phrase instead."""
    if len(items) < MIN_ANSWERS:
        return
    for line in lines("tell_tales"):
        pattern = re.compile(line["pattern"], re.I)
        rows = [item.number for item in items if pattern.search(item.exchange.answer)]
        if len(rows) >= TELL_TALE_SHARE * len(items):
            detail = f"a phrase of generators is in {len(rows):,} of {len(items):,} answers"
            yield LintFinding("balance", rows[0], detail, line["phrase"])


def common_phrase(items: Sequence[LintRow]) -> str:
    """Return a note on the number of refusals that share an n-gram, "" for fewer than half.

    It is no flaw of a row, since refusals do resemble each other.
    """
    sample = items[:: -(-len(items) // SAMPLE) or 1]
    counts: Counter[tuple[str, ...]] = Counter()
    for item in sample:
        words = words_of(item.exchange.answer)
        counts.update({words[i : i + PHRASE_WORDS] for i in range(len(words) - PHRASE_WORDS + 1)})
    highest = max(counts.values(), default=0)
    if len(items) < MIN_ANSWERS or highest < PHRASE_SHARE * len(sample):
        return ""
    return (
        f"{highest:,} of {len(sample):,} refusals share a run of {PHRASE_WORDS} words: a model may "
        "learn the phrase alone"
    )


def licences(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find licences that forbid commercial use or grant nothing, once per licence."""
    first: dict[str, int] = {}
    for item in rows.items:
        name = item.label("licence", "license") or declared.licence
        first.setdefault(name, item.number)
    for name, row in first.items():
        if _NON_COMMERCIAL.search(name):
            yield LintFinding("licence", row, f"licence {name} forbids commercial use")
        elif _NOT_GRANTED.search(name):
            yield LintFinding("licence", row, f"licence {name} does not grant use")
