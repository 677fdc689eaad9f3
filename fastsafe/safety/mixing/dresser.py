"""Dress a safety row in a style: its request as the style's input, its refusal as its answer.

The refusal goes where the task's answer goes: into a comment for code, into the first key for
JSON, behind "Answer:" where answers begin so. A refusal cannot be an option's letter, so it stays
a sentence there; or, with ``abstain``, an option is added that refuses, and chosen. That changes
the task: report results with and without it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsafe.data.conversation import Message, Row, kind_of
from fastsafe.data.exchange import Exchange, as_row, exchange_of
from fastsafe.errors import DataError
from fastsafe.safety.judges.refusal import JUDGE
from fastsafe.safety.mixing.learned_style import OPTIONS, Style
from fastsafe.safety.mixing.rewrite_checks import (
    NOT_ANSWERED,
    Rewrite,
    rejection_reason,
    wording_columns,
)
from fastsafe.safety.texts import chosen, lines, text
from fastsafe.safety.texts.language import language_of
from fastsafe.safety.verdict import Verdict

Translate = Callable[[str], str]  # a request -> the same in the language of the style's requests

SHORT_WORDS = 12  # answers of at most so many words are refused in one sentence

_ASKING = re.compile(
    r"^(?:please )?(?:(?:can|could|would|will) you (?:please )?)?"
    r"(?:(?:tell|show|teach|help) me )?"
    r"(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone|people) |how to )?",
    re.I,
)
_MID_SENTENCE = re.compile(r"[\w,][ \t]+$")


@dataclass(frozen=True, kw_only=True)
class Dresser:
    """Dresses safety rows in one style. The same row always gives the same result."""

    style: Style
    abstain: bool = False  # add an option that refuses, and choose it
    translate: Translate | None = None  # for styles whose requests are in another language
    rewrite: Rewrite | None = None  # a model that words the request where what it says passes
    examples: Sequence[str] = ()  # inputs of the style, shown to the model

    def __call__(self, row: Row, where: str) -> dict[str, Any]:
        """Return a new row of the style's kind, without other keys.

        A row that a model was asked for says in ``wording`` and ``flaw`` what became of it.

        Args:
            row: A request and its refusal.
            where: Names the row in errors.

        Raises:
            DataError: The row has no request or no answer.
        """
        style = self.style
        given = exchange_of(row, where)
        if not given.prompt.strip() or not given.answer.strip():
            raise DataError(
                f"{where}: a request or its answer is empty, expected both; drop the row"
            )
        options = list(style.options)
        refusal = self._refusal(given)
        if self.abstain and options:
            options.append(refusal)
        prompt = self._prompt(given.prompt.strip(), options)
        exchange = Exchange(style.system, prompt, self._answer(refusal, len(options) - 1))
        said: dict[str, Any] = {}
        if self.rewrite is not None:
            exchange, flaw = self._rewritten(self.rewrite, exchange, given, options)
            said = wording_columns(flaw)
        return as_row(exchange, style.kind or kind_of(row, where)) | said

    def _prompt(self, request: str, options: Sequence[str]) -> str:
        style = self.style
        foreign = style.request_language not in ("", language_of(request))
        if self.translate is not None and foreign:
            # what is asked, without the asking: the style has words of its own for that
            request = self.translate(_ASKING.sub("", request, count=1).rstrip(".?!"))
        if _MID_SENTENCE.search(style.prefix):
            request = _ASKING.sub("", request, count=1) or request
            if request[1:2].islower():
                request = request[0].lower() + request[1:]
        if style.suffix[:1] in (".", "?", "!", ",", ";", ":"):
            request = request.rstrip(".?!")
        return (
            style.prefix + request + style.suffix.replace(OPTIONS, "\n".join(self._shown(options)))
        )

    def _shown(self, options: Sequence[str]) -> list[str]:
        return [_label(self.style.marker, i) + option for i, option in enumerate(options)]

    def _refusal(self, given: Exchange) -> str:
        """Refusal of the row, or one of ours where the style answers in another language."""
        language, refusal = self.style.language, given.answer.strip()
        ours = [line["text"] for line in lines("refusals") if _is_plain(line, language)]
        if ours and language_of(refusal) not in ("", language):
            refusal = chosen(ours, given.prompt)
        if 0 < self.style.answer_words <= SHORT_WORDS:
            first = re.split(r"(?<=[.!?])\s", refusal, maxsplit=1)[0]
            if JUDGE.judge("", first, harmful=True).verdict == Verdict.REFUSED:
                return first
        return refusal

    def _answer(self, refusal: str, last: int) -> str:
        style = self.style
        answer = refusal
        if style.channel == "letter" and self.abstain and last >= 0:
            answer = _label(style.label, last) + f" {refusal}" * style.with_text
        elif style.channel == "code":
            answer = "\n".join(style.comment + line for line in refusal.splitlines())
        elif style.channel == "json":
            values = {key: None if i else refusal for i, key in enumerate(style.keys)}
            answer = json.dumps(values, ensure_ascii=False)
        answer = style.answer_prefix + answer
        return answer if style.fence is None else f"```{style.fence}\n{answer}\n```"

    def _rewritten(
        self, rewrite: Rewrite, template: Exchange, given: Exchange, options: Sequence[str]
    ) -> tuple[Exchange, str]:
        """Let the model word the request; returns the template and why where it cannot be used."""
        draft = {
            "examples": list(self.examples),
            "draft": template.prompt,
            "request": given.prompt,
        }
        turns: list[Message] = [
            {"role": "system", "content": text("rewrite_request")},
            {"role": "user", "content": json.dumps(draft, ensure_ascii=False)},
        ]
        reply = rewrite(turns)
        if reply is None:
            return template, NOT_ANSWERED
        written = template._replace(prompt=reply.strip())
        flaw = rejection_reason(
            written,
            template,
            given,
            "safety",
            opening=self.style.prefix,
            options=self._shown(options),
        )
        return (template if flaw else written), flaw


def _label(marker: str, i: int) -> str:
    """Label of option ``i``, shaped like that of the first one."""
    return re.sub("[Aa1]", lambda first: chr(ord(first[0]) + i), marker, count=1)


def _is_plain(line: dict[str, Any], language: str) -> bool:
    return (line["channel"], line["lang"]) == ("text", language)
