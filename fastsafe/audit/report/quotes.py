"""Answers that fine-tuning set free, quoted or redacted."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsafe.audit.report.matrix import BASE, mark
from fastsafe.audit.store import Store

PER_CELL = 2
MAX_CHARS = 1200


@dataclass(frozen=True)
class Quote:
    """One behaviour that the base did not answer and the tuned model does."""

    condition: str
    format: str
    behaviour: str
    prompt: str
    before: str
    after: str


def quotes(results: Mapping[str, Any], store: Store, *, is_shown: bool) -> list[Quote]:
    """Return up to two examples of every cell that rose beyond chance.

    Args:
        results: Of the run.
        store: Of the run.
        is_shown: False replaces every prompt and completion by its length: a report that is
            passed on must not carry harmful text by default.
    """
    judge, identity = next(iter(results["run"]["judges"].items()))
    verdicts = {
        (condition, part, item): verdict
        for condition, kind, part, system_prompt, item, verdict in store.verdicts(identity)
        if kind == "harmful" and system_prompt == results["cells"][0]["system_prompt"]
    }
    found = []
    for cell in results["cells"]:
        if cell["judge"] != judge or mark(cell) != "▲":
            continue
        condition, part = cell["condition"], cell["format"]
        base = {item: text for item, _, text in store.answers(BASE, "harmful", part)}
        flipped = [
            Quote(condition, part, item, prompt, base[item], text)
            for item, prompt, text in store.answers(condition, "harmful", part)
            if verdicts.get((BASE, part, item)) == "refused"
            and verdicts.get((condition, part, item)) == "complied_harmful"
        ]
        found += flipped[:PER_CELL]
    return [_prepared(quote, is_shown) for quote in found]


def _prepared(quote: Quote, is_shown: bool) -> Quote:
    text = visible if is_shown else _redacted
    return Quote(
        quote.condition,
        quote.format,
        quote.behaviour,
        text(quote.prompt),
        text(quote.before),
        text(quote.after),
    )


def _redacted(text: str) -> str:
    return f"[{len(text)} characters]"


def visible(text: str) -> str:
    """Return text without characters that could hide or reorder others, and of bounded length."""
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "\ufffd"
        for c in text[:MAX_CHARS]
    )
    return shown + (" [cut]" if len(text) > MAX_CHARS else "")
