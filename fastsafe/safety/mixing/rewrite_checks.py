"""Checks of a model's wording of a training row, which is accepted as a whole or not at all.

A row whose wording is rejected keeps that of its template. The columns ``wording`` ("model" or
"template") and ``flaw`` (the rejection reason) record the outcome, so that both are counted.
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

# a conversation -> the model's answer, None without one
Rewrite = Callable[[Sequence[Message]], str | None]

WORDING = "wording"  # column: "model" or "template"
NOT_ANSWERED = "the model gave no whole answer"
MAX_GROWTH = 3  # of a request's length, against the template
MIN_KEPT = 0.5  # share of a request's words that its new wording must keep

_STEM = 4  # letters that are compared of a word: pick, picked


def wording_columns(reason: str) -> dict[str, Any]:
    """Return the columns that record the outcome: "" for an accepted wording, else the reason."""
    return {WORDING: "template" if reason else "model", "flaw": reason or None}


def rejection_reason(
    reworded: Exchange,
    template: Exchange,
    given: Exchange,
    kind: Kind,
    *,
    opening: str = "",
    options: Sequence[str] = (),
) -> str:
    """Return the reason why a model's wording is rejected, "" where it is accepted.

    Args:
        reworded: The row in the model's wording.
        template: The row in the template's wording.
        given: The original row.
        kind: "safety" for a row that should refuse, "user" for one that should answer.
        opening: Common prefix of the style's requests.
        options: Lines that the request must contain.
    """
    begin = opening.strip().casefold()
    words = _words(given.prompt)
    refuses = refusal.JUDGE.judge("", reworded.prompt, harmful=True).verdict
    checks = {
        "the request is empty": not reworded.prompt.strip(),
        "the request is a refusal": refuses == Verdict.REFUSED,
        "the request is much longer": len(reworded.prompt) > MAX_GROWTH * len(template.prompt),
        "the request is in another language": _is_foreign(
            reworded.prompt, template.prompt, given.prompt
        ),
        "the request begins in another style": not reworded.prompt.casefold().startswith(begin),
        "the request loses its options": not {*options} <= {*reworded.prompt.splitlines()},
        "the request loses its words": len(words & _words(reworded.prompt)) < MIN_KEPT * len(words),
        "the answer lost the original": _plain(given.answer) not in _plain(reworded.answer)
        and reworded.answer != template.answer,
        "the answer is in another language": _is_foreign(
            reworded.answer, template.answer, given.answer
        ),
    }
    reason = next((reason for reason, applies in checks.items() if applies), "")
    rules = sorted(_rules(reworded, kind) - _rules(template, kind))
    return reason or (f"lint: {rules[0]}" if rules else "")


def _is_foreign(text: str, *others: str) -> bool:
    languages = {language_of(other) for other in others} - {""}
    return bool(languages) and language_of(text) not in ("", *languages)


def _rules(exchange: Exchange, kind: Kind) -> set[str]:
    return {finding.rule for finding in lint([as_row(exchange, "messages")], kind=kind).findings}


def _words(text: str) -> set[str]:
    return {word[:_STEM] for word in re.findall(r"\w+", text.casefold()) if len(word) >= _STEM}


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold()).strip()
