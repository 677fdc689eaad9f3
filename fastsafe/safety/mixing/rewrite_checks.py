"""What a model worded for a training row, checked: taken whole, or not at all.

A row whose wording does not pass keeps that of its template. Every row that a model was asked for
says who worded it (``wording``) and why it was not the model (``flaw``), so that both are counted.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from fastsafe.data.conversation import Message
from fastsafe.data.exchange import Exchange, as_row
from fastsafe.safety.judges import refusal
from fastsafe.safety.lint import Kind, lint
from fastsafe.safety.texts.language import language_of
from fastsafe.safety.verdict import Verdict

# a conversation -> the model's answer, None where it has none
Rewrite = Callable[[Sequence[Message]], str | None]

WORDING = "wording"  # column: "model" or "template"
NOT_ANSWERED = "the model gave no whole answer"
MAX_GROWTH = 3  # a request is at most so many times as long as the template makes it
KEPT = 0.5  # of the words of a request must be in its new wording

_STEM = 4  # letters by which two words count as one: pick, picked


def wording_columns(flaw: str) -> dict[str, Any]:
    """Return the columns of a row that a model was asked for; no flaw is its own wording."""
    return {WORDING: "template" if flaw else "model", "flaw": flaw or None}


def rejection_reason(
    written: Exchange,
    template: Exchange,
    given: Exchange,
    kind: Kind,
    *,
    opening: str = "",
    options: Sequence[str] = (),
) -> str:
    """Return why a model's wording cannot be used, "" where it can.

    Args:
        written: The row in the model's words.
        template: The row as its template words it.
        given: What both are made of.
        kind: What the row should do: "safety", refuse; "user", answer.
        opening: What every request of the style begins with.
        options: Lines that the request must hold.
    """
    begin = opening.strip().casefold()
    words = _words(given.prompt)
    refuses = refusal.JUDGE.judge("", written.prompt, harmful=True).verdict
    flaws = {
        "the request is empty": not written.prompt.strip(),
        "the request is a refusal": refuses == Verdict.REFUSED,
        "the request is much longer": len(written.prompt) > MAX_GROWTH * len(template.prompt),
        "the request is in another language": _is_foreign(
            written.prompt, template.prompt, given.prompt
        ),
        "the request begins in another style": not written.prompt.casefold().startswith(begin),
        "the request loses its options": not {*options} <= {*written.prompt.splitlines()},
        "the request loses its words": len(words & _words(written.prompt)) < KEPT * len(words),
        "the answer lost the original": _plain(given.answer) not in _plain(written.answer)
        and written.answer != template.answer,
        "the answer is in another language": _is_foreign(
            written.answer, template.answer, given.answer
        ),
    }
    said = next((flaw for flaw, is_so in flaws.items() if is_so), "")
    rules = sorted(_rules(written, kind) - _rules(template, kind))
    return said or (f"lint: {rules[0]}" if rules else "")


def _is_foreign(text: str, *others: str) -> bool:
    known = {language_of(other) for other in others} - {""}
    return bool(known) and language_of(text) not in ("", *known)


def _rules(exchange: Exchange, kind: Kind) -> set[str]:
    return {each.rule for each in lint([as_row(exchange, "messages")], kind=kind).findings}


def _words(text: str) -> set[str]:
    return {word[:_STEM] for word in re.findall(r"\w+", text.casefold()) if len(word) >= _STEM}


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold()).strip()
