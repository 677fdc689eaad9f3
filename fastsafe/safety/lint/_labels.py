"""What is said about rows and how they are spread: `language`, `balance`, `licence` (L5-L7, L9)."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fastsafe.safety.texts import lines
from fastsafe.safety.texts.language import language_of

from ._rows import Declared, LintFinding, LintRow, Set, words_of

MIN_SHARE = 0.8  # of the largest format's rows that every other should have
TELL_TALE_SHARE = 0.1  # of answers with a known phrase of generators
PHRASE_SHARE = 0.5  # of answers with one run of words
PHRASE_WORDS = 4
SAMPLE = 2000  # answers looked at for that
MIN_ANSWERS = 50  # below which a phrase is no pattern

_TARGET = re.compile(
    r"\btranslat\w*\b[^\n]{0,120}?\b(?:in)?to (english|french|german|spanish)\b", re.I
)
_CODES = {"english": "en", "french": "fr", "german": "de", "spanish": "es"}
_OPTION = re.compile(r"^\s*[\[(]?(?:[A-Da-d]|[1-4])[\]).:]+\s+\S", re.M)
# what a prompt in the format shows; other formats show nothing that must be there
_SIGNS = {
    "classification": _OPTION,
    "multiple_choice": _OPTION,
    "translation": re.compile(r"transl|tradui|übersetz|traduc", re.I),
    "true_false": re.compile(r"true|vrai|wahr|verdad", re.I),
}
_NON_COMMERCIAL = re.compile(r"(?:^|[^a-z])nc(?:[^a-z]|$)|non-?\s?commercial", re.I)
_NOT_GRANTED = re.compile(r"gated|unknown|none|proprietary|all rights reserved|no licen[cs]e", re.I)


def languages(rows: Set, declared: Declared) -> Iterator[LintFinding]:
    """Find answers in another language than is declared, or than a translation asks for.

    The language is read from function words (English, French, German, Spanish): nearly all
    sentences of ten words or more are told apart; of code and shorter ones nothing is said.
    """
    safety = {item.number for item in rows.safety}
    for item in rows.items:
        wanted = {item.label("lang", "language") or declared.language} - {""}
        target = _TARGET.search(item.exchange.prompt)
        if target and not wanted:
            wanted = {_CODES[target[1].lower()]}
            # a refusal may as well be in the language of the request around the text
            wanted |= {"en"} if item.number in safety else set()
        found = language_of(item.exchange.answer) if wanted else ""
        if found and found not in wanted:
            expected = " or ".join(sorted(wanted))
            detail = f"the answer is in {found}, expected {expected}"
            yield LintFinding("language", item.number, detail, item.exchange.answer)


def balance(rows: Set, declared: Declared) -> Iterator[LintFinding]:
    """Find formats with too few safety rows, wrong or missing labels, and shortcut phrases."""
    formats = {item.number: item.format(declared) for item in rows.safety}
    counts = Counter(name for name in formats.values() if name)
    most = max(counts.values(), default=0)
    for name, n in counts.items():
        if n + 1 < MIN_SHARE * most:  # one row more or less is rounding
            row = next(i for i, held in formats.items() if held == name)
            detail = f"format {name} has {n} safety rows, another has {most}"
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
    """Find phrases that so many refusals hold that a model may learn them instead."""
    if len(items) < MIN_ANSWERS:
        return
    for line in lines("tell_tales"):
        pattern = re.compile(line["pattern"], re.I)
        held = [item.number for item in items if pattern.search(item.exchange.answer)]
        if len(held) >= TELL_TALE_SHARE * len(items):
            detail = f"a phrase of generators is in {len(held):,} of {len(items):,} answers"
            yield LintFinding("balance", held[0], detail, line["phrase"])


def common_phrase(items: Sequence[LintRow]) -> str:
    """Say how many answers of safety rows share one run of words, "" for fewer than half.

    No flaw of a row: refusals do resemble each other.
    """
    looked_at = items[:: -(-len(items) // SAMPLE) or 1]
    counts: Counter[tuple[str, ...]] = Counter()
    for item in looked_at:
        words = words_of(item.exchange.answer)
        counts.update({words[i : i + PHRASE_WORDS] for i in range(len(words) - PHRASE_WORDS + 1)})
    most = max(counts.values(), default=0)
    if len(items) < MIN_ANSWERS or most < PHRASE_SHARE * len(looked_at):
        return ""
    return (
        f"{most:,} of {len(looked_at):,} refusals share a run of {PHRASE_WORDS} words: a model may "
        "learn the phrase alone"
    )


def licences(rows: Set, declared: Declared) -> Iterator[LintFinding]:
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
