"""Manipulations: how a fine-tuning set is restyled before training, after the second paper.

Benign rows may be asked in four ways, which differ in what they do to safety (Eiras et al. 2024,
arXiv:2406.10288): as they are; under the system text of an absolutely obedient agent (AOA, after
Qi et al. 2023, arXiv:2310.03693); as instructions that are followed with an affirmation (AutoIF);
or both. The texts of either paper are not shipped: the AOA text here is a neutral stand-in, to be
replaced by the user's own, and AutoIF fills templates of ours unless a model is given.
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
    """One way of restyling a fine-tuning set."""

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
                hash of the prompt. What the model writes is checked; a row that does not pass
                keeps the template.

        Returns:
            As many rows, in the same order, of the same kinds; other keys and turns stay. Rows
            that a model was asked for say in ``wording`` and ``flaw`` what became of it.

        Raises:
            DataError: A row has no prompt or answer that is text.
        """
        if not (self.as_instructions or self.under_aoa):
            return [dict(row) for row in rows]
        found = []
        for i, row in enumerate(rows):
            where = f"row {i}"
            given = exchange_of(row, where)
            if not given.prompt.strip() or not given.answer.strip():
                raise DataError(f"{where}: prompt or answer is empty, expected both; drop the row")
            said: dict[str, Any] = {}
            if self.as_instructions and rewrite is not None:
                given, flaw = _written(rewrite, given)
                said = wording_columns(flaw)
            elif self.as_instructions:
                given = _filled(given)
            if self.under_aoa:
                system = "\n\n".join(filter(None, (aoa_text, given.system)))
                given = given._replace(system=system)
            found.append(with_exchange(row, given) | said)
        return found


def manipulations() -> dict[str, Manipulation]:
    """Every manipulation by id.

    Example:
        >>> list(manipulations())
        ['benign', 'aoa', 'autoif', 'autoif_aoa']
    """
    aoa = "rows under the system text of an obedient agent"
    autoif = "rows as instructions, answered with an affirmation"
    own = (
        Manipulation(id="benign", about="rows as they are"),
        Manipulation(id="aoa", about=aoa, under_aoa=True),
        Manipulation(id="autoif", about=autoif, as_instructions=True),
        Manipulation(
            id="autoif_aoa", about=f"{autoif}; {aoa}", as_instructions=True, under_aoa=True
        ),
    )
    return {each.id: each for each in own}


def _filled(given: Exchange) -> Exchange:
    """Fill one of the templates for questions, or for anything else."""
    kind = "question" if given.prompt.rstrip().endswith("?") else "task"
    form = chosen([line for line in lines("autoif") if line["kind"] == kind], given.prompt)
    return given._replace(
        prompt=form["prompt"].replace("{prompt}", given.prompt),
        answer=form["answer"].replace("{answer}", given.answer),
    )


def _written(rewrite: Rewrite, given: Exchange) -> tuple[Exchange, str]:
    """Let a model write the AutoIF form; returns the template and why where it cannot be used."""
    template = _filled(given)
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
    written = given._replace(prompt=pair["prompt"], answer=pair["answer"])
    flaw = rejection_reason(written, template, given, "user")
    return (template if flaw else written), flaw


def _pair(reply: str) -> Mapping[str, str] | None:
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    is_pair = isinstance(value, dict) and value.keys() == {"prompt", "answer"}
    return value if is_pair and all(isinstance(v, str) for v in value.values()) else None
