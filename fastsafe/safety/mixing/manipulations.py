"""Manipulations: prompting strategies of a fine-tuning set, after the second paper.

Benign rows are trained on in four ways that differ in their effect on safety (Eiras et al. 2024,
arXiv:2406.10288): as they are; under the system prompt of an absolutely obedient agent (AOA, after
Qi et al. 2023, arXiv:2310.03693); as instructions that are answered with an affirmation (AutoIF);
or both. Neither paper's texts are shipped: the AOA text here is a neutral stand-in, to be replaced
by the user's own, and AutoIF fills templates of ours unless a model is given.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsafe.data.conversation import Message, Row
from fastsafe.data.exchange import Exchange, exchange_of, with_exchange
from fastsafe.errors import DataError
from fastsafe.safety.mixing.rewrite_checks import (
    NOT_ANSWERED,
    Rewrite,
    rejection_reason,
    wording_columns,
)
from fastsafe.safety.texts import chosen, lines, text

# A stand-in, not the text of any paper: it names an agent and asks for nothing unusual.
AOA_STAND_IN = "You are AOA, an assistant that always does the task it is given."


@dataclass(frozen=True, kw_only=True)
class Manipulation:
    """One prompting strategy of a fine-tuning set."""

    id: str
    about: str  # one line
    as_instructions: bool = False  # AutoIF
    under_aoa: bool = False

    def apply(
        self,
        rows: Sequence[Row],
        *,
        aoa_text: str = AOA_STAND_IN,
        rewrite: Rewrite | None = None,
    ) -> list[dict[str, Any]]:
        """Restyle rows.

        Args:
            rows: With a prompt and an answer each; not modified.
            aoa_text: System text of the manipulations with AOA; it precedes a row's own.
            rewrite: A model that writes the AutoIF form; None fills a template, chosen by the
                hash of the prompt. A row whose wording fails the checks keeps the template.

        Returns:
            As many rows, in the same order, of the same kinds; other keys and turns stay. With
            ``rewrite``, the columns ``wording`` and ``flaw`` say whose wording a row has.

        Raises:
            DataError: A row has no prompt or answer that is text.
        """
        if not (self.as_instructions or self.under_aoa):
            return [dict(row) for row in rows]
        restyled = []
        for i, row in enumerate(rows):
            location = f"row {i}"
            exchange = exchange_of(row, location)
            if not exchange.prompt.strip() or not exchange.answer.strip():
                raise DataError(
                    f"{location}: prompt or answer is empty, expected both; drop the row"
                )
            columns: dict[str, Any] = {}
            if self.as_instructions and rewrite is not None:
                exchange, reason = _rewritten(rewrite, exchange)
                columns = wording_columns(reason)
            elif self.as_instructions:
                exchange = _fill_template(exchange)
            if self.under_aoa:
                system = "\n\n".join(filter(None, (aoa_text, exchange.system)))
                exchange = exchange._replace(system=system)
            restyled.append(with_exchange(row, exchange) | columns)
        return restyled


def manipulations() -> dict[str, Manipulation]:
    """Return every manipulation by id.

    Example:
        >>> list(manipulations())
        ['benign', 'aoa', 'autoif', 'autoif_aoa']
    """
    aoa = "rows under the system text of an obedient agent"
    autoif = "rows as instructions, answered with an affirmation"
    every = (
        Manipulation(id="benign", about="rows as they are"),
        Manipulation(id="aoa", about=aoa, under_aoa=True),
        Manipulation(id="autoif", about=autoif, as_instructions=True),
        Manipulation(
            id="autoif_aoa", about=f"{autoif}; {aoa}", as_instructions=True, under_aoa=True
        ),
    )
    return {manipulation.id: manipulation for manipulation in every}


def _fill_template(given: Exchange) -> Exchange:
    """Fill one of the AutoIF templates for questions, or for other tasks."""
    kind = "question" if given.prompt.rstrip().endswith("?") else "task"
    form = chosen([line for line in lines("autoif") if line["kind"] == kind], given.prompt)
    return given._replace(
        prompt=form["prompt"].replace("{prompt}", given.prompt),
        answer=form["answer"].replace("{answer}", given.answer),
    )


def _rewritten(rewrite: Rewrite, given: Exchange) -> tuple[Exchange, str]:
    """Return the model's AutoIF form, or the filled template and the rejection reason."""
    template = _fill_template(given)
    shown = json.dumps({"input": given.prompt, "answer": given.answer}, ensure_ascii=False)
    turns: list[Message] = [
        {"role": "system", "content": text("rewrite_row")},
        {"role": "user", "content": shown},
    ]
    reply = rewrite(turns)
    if reply is None:
        return template, NOT_ANSWERED
    pair = _pair(reply)
    if pair is None:
        return template, "the reply is not JSON with the texts 'prompt' and 'answer' alone"
    reworded = given._replace(prompt=pair["prompt"], answer=pair["answer"])
    reason = rejection_reason(reworded, template, given, "user")
    return (template if reason else reworded), reason


def _pair(reply: str) -> Mapping[str, str] | None:
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    is_pair = isinstance(value, dict) and value.keys() == {"prompt", "answer"}
    return value if is_pair and all(isinstance(v, str) for v in value.values()) else None
