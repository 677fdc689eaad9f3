"""Examples of answers that the untouched model refused, quoted or redacted."""

import hashlib
import unicodedata
from dataclasses import dataclass, replace

from fastsafe.audit.report.matrix import BASE, mark
from fastsafe.audit.results.pooled_rates import cell_verdicts
from fastsafe.audit.results.schema.run import Results
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.data.thoughts import answer_of

PER_CELL = 2
MAX_CHARS = 1200


@dataclass(frozen=True)
class Quote:
    """One behaviour that the base refuses and the tuned model answers."""

    condition: str
    format: str
    behaviour: str
    prompt: str
    before: str
    after: str


def quotes(results: Results, store: Store, *, is_shown: bool) -> list[Quote]:
    """Return up to two examples of every cell whose answer rate rose significantly.

    Args:
        results: Results of the run.
        store: Store of the run.
        is_shown: False replaces every prompt and completion by its length, and the behaviour's
            id, which may name the action, by a hash: a report that is passed on must not carry
            harmful text by default.
    """
    judge, identity = next(iter(results["run"]["judges"].items()))
    verdicts, _ = cell_verdicts(store, identity)
    examples = []
    for cell in results["cells"]:
        if cell["judge"] != judge or mark(cell) != "▲":
            continue
        condition, place = cell["condition"], (cell["format"], cell["system_prompt"])
        base = {item: answer_of(text) for item, _, text in store.answers(BASE, *place)}
        flipped = [
            Quote(condition, cell["format"], item, prompt, base[item], answer_of(text))
            for item, prompt, text in store.answers(condition, *place)
            if verdicts[BASE, *place].get(item) == "refused"
            and verdicts[condition, *place].get(item) == "complied_harmful"
        ]
        examples += flipped[:PER_CELL]
    return [_prepared(quote, is_shown) for quote in examples]


def _prepared(quote: Quote, is_shown: bool) -> Quote:
    text = visible if is_shown else _redacted
    name = quote.behaviour
    return replace(
        quote,
        behaviour=name if is_shown else hashlib.sha256(name.encode()).hexdigest()[:8],
        prompt=text(quote.prompt),
        before=text(quote.before),
        after=text(quote.after),
    )


def _redacted(text: str) -> str:
    return f"[{len(text)} characters]"


def visible(text: str) -> str:
    """Return text of bounded length, without characters that could hide or reorder others."""
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "\ufffd"
        for c in text[:MAX_CHARS]
    )
    return shown + (" [cut]" if len(text) > MAX_CHARS else "")
