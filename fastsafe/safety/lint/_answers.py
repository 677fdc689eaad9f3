"""Rules on answers: `non_refusal` (L1), and refusing or empty user rows under `balance` (L11).

The answer of a safety row refuses when a clause that begins in its first 300 characters opens
with a refusal, and the answer does not open with an affirmation. The refusal screen of
``fastsafe.safety.judges`` classifies the clauses, in its languages and through its wrappings
(code comments, labels, option letters). An answer with other words of a refusal (a negation in
the first person, words of harm) passes, too, unless it opens with an affirmation: false alarms
would hide the finding. Recall: answers that comply without any such word. A refusal in a language
that the screen lacks is a false alarm.
"""

import re
from collections.abc import Iterator
from typing import Any

from fastsafe.data.conversation import Row, has_blank_answer, is_turns
from fastsafe.safety.judges.refusal import hints_at_refusal

from ._rows import Declared, LintFinding, LintRow, LintSet

OPENING_CHARS = 300
_EMPTY_AMONG_OTHERS = "one of the answers is empty: it trains the model to end at once"

_CLAUSE = re.compile(r"(?:(?<=[.!?:;,])\s+|\n+)(?=\S)")
_AFFIRMATION = re.compile(
    r"\W*(?:sure|certainly|of course|absolutely|here(?:'s| is| are)|yes,|step 1|first,|bien s[uû]r"
    r"|voici|natürlich|gerne|hier ist|claro|por supuesto|aquí)\b",
    re.I,
)


def answers(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find safety rows that do not refuse, and user rows that refuse, are empty or cut off."""
    for item in rows.safety:
        if not item.refuses and (detail := _flaw(item)):
            yield LintFinding("non_refusal", item.number, detail, item.exchange.answer)
        elif has_blank_answer(item.row):
            yield LintFinding("balance", item.number, _EMPTY_AMONG_OTHERS)
    for item in rows.user:
        answer = item.exchange.answer.strip()
        if not answer and not _ends_in_call(item.row):
            yield LintFinding("balance", item.number, "the answer is empty: nothing to train on")
        elif has_blank_answer(item.row):
            yield LintFinding("balance", item.number, _EMPTY_AMONG_OTHERS)
        elif item.refuses:
            detail = "the answer refuses, in a row that should be answered"
            yield LintFinding("balance", item.number, detail, answer)
        elif answer.count("```") % 2:
            detail = "the answer is cut off: its code fence never closes"
            yield LintFinding("balance", item.number, detail, answer)


def _ends_in_call(row: Row) -> bool:
    """Return whether the last answer of a row calls tools; it needs no text."""
    turns: Any = row.get("messages", row.get("completion"))
    answers = [turn for turn in turns if turn["role"] == "assistant"] if is_turns(turns) else []
    return bool(answers) and bool(answers[-1].get("tool_calls"))


def _flaw(item: LintRow) -> str:
    answer = item.exchange.answer
    if not answer.strip():
        return "the answer is empty"
    starts = [0, *(match.end() for match in _CLAUSE.finditer(answer))]
    refusing = [at for at in starts if item.opens_with_refusal(answer[at:])]
    affirms = _AFFIRMATION.match(answer) is not None
    if not refusing:
        hints = not affirms and hints_at_refusal(answer[:OPENING_CHARS])
        return "" if hints else "no clause of the answer opens with a refusal"
    if affirms:
        return "the answer opens with an affirmation and refuses later"
    if refusing[0] >= OPENING_CHARS:
        return f"the answer does not refuse in its first {OPENING_CHARS} characters, only later"
    return ""
