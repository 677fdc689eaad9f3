"""The dresser: rewrites a safety row in a style, the request as its input, the refusal as answer.

The refusal takes the place of the task's answer: in a comment for code, under the first key for
JSON, after "Answer:" where answers begin so. A refusal cannot be an option's letter: it stays a
sentence there, or, with ``abstain``, an option that refuses is added and chosen. That changes the
task: report results with and without it.
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

Translate = Callable[[str], str]  # a request -> the request in the style's language

SHORT_WORDS = 12  # up to this length of answers, a refusal is cut to its first sentence

_ASKING = re.compile(
    r"^(?:please )?(?:(?:can|could|would|will) you (?:please )?)?"
    r"(?:(?:tell|show|teach|help) me )?"
    r"(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone|people) |how to )?",
    re.I,
)
_MID_SENTENCE = re.compile(r"[\w,][ \t]+$")


@dataclass(frozen=True, kw_only=True)
class Dresser:
    """Rewrites safety rows in one style, deterministically."""

    style: Style
    abstain: bool = False  # add an option that refuses, and choose it
    translate: Translate | None = None  # for styles whose requests are in another language
    rewrite: Rewrite | None = None  # a model that rewords the request, subject to checks
    examples: Sequence[str] = ()  # inputs of the style, shown to the model

    def __call__(self, row: Row, location: str) -> dict[str, Any]:
        """Return a new row of the style's kind, without other keys.

        With ``rewrite``, the columns ``wording`` and ``flaw`` say whose wording the row has.

        Args:
            row: A request and its refusal.
            location: Names the row in errors.

        Raises:
            DataError: The row has no request or no answer.
        """
        style = self.style
        given = exchange_of(row, location)
        if not given.prompt.strip() or not given.answer.strip():
            raise DataError(
                f"{location}: a request or its answer is empty, expected both; drop the row"
            )
        options = list(style.options)
        refusal = self._refusal(given)
        if self.abstain and options:
            options.append(refusal)
        prompt = self._prompt(given.prompt.strip(), options)
        exchange = Exchange(style.system, prompt, self._answer(refusal, len(options) - 1))
        columns: dict[str, Any] = {}
        if self.rewrite is not None:
            exchange, reason = self._rewritten(self.rewrite, exchange, given, options)
            columns = wording_columns(reason)
        return as_row(exchange, style.kind or kind_of(row, location)) | columns

    def _prompt(self, request: str, options: Sequence[str]) -> str:
        style = self.style
        foreign = style.request_language not in ("", language_of(request))
        if self.translate is not None and foreign:
            # the action alone: the style has its own words around it
            request = self.translate(_ASKING.sub("", request).rstrip(".?!"))
        if _MID_SENTENCE.search(style.prefix):
            request = _ASKING.sub("", request) or request
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
        """Return the row's refusal, or a shipped one where the style has another language."""
        language, refusal = self.style.language, given.answer.strip()
        shipped = [line["text"] for line in lines("refusals") if _is_plain(line, language)]
        if shipped and language_of(refusal) not in ("", language):
            refusal = chosen(shipped, given.prompt)
        if 0 < self.style.answer_words <= SHORT_WORDS:
            first = re.split(r"(?<=[.!?])\s", refusal)[0]
            if JUDGE.judge("", first, harmful=True).verdict == Verdict.REFUSED:
                return first
        return refusal

    def _answer(self, refusal: str, last: int) -> str:
        style = self.style
        answer = refusal
        if style.channel == "letter" and self.abstain and last >= 0:
            answer = _label(style.label, last)
            if style.with_text:
                answer += f" {refusal}"
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
        """Return the exchange in the model's wording, or the template and the rejection reason."""
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
        reworded = template._replace(prompt=reply.strip())
        reason = rejection_reason(
            reworded,
            template,
            given,
            "safety",
            opening=self.style.prefix,
            options=self._shown(options),
        )
        return (template if reason else reworded), reason


def _label(marker: str, i: int) -> str:
    """Return the label of option ``i``, in the form of the first one."""
    return re.sub("[Aa1]", lambda first: chr(ord(first[0]) + i), marker, count=1)


def _is_plain(line: dict[str, Any], language: str) -> bool:
    return (line["channel"], line["lang"]) == ("text", language)
