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
from fastsafe.errors import DataError
from fastsafe.safety.exchange import Exchange, as_row, exchange_of
from fastsafe.safety.judges import judges
from fastsafe.safety.language import language_of
from fastsafe.safety.style import OPTIONS, Style
from fastsafe.safety.texts import chosen, lines, text
from fastsafe.safety.verdict import Verdict

Rewrite = Callable[[Sequence[Message]], str]  # a conversation -> the model's answer
Translate = Callable[[str], str]  # a request -> the same in the language of the style's requests

SHORT_WORDS = 12  # answers of at most so many words are refused in one sentence
MAX_GROWTH = 3  # a rewritten request is at most so many times as long as the style makes it

_ASKING = re.compile(
    r"^(?:please )?(?:(?:can|could|would|will) you (?:please )?)?"
    r"(?:(?:tell|show|teach|help) me )?"
    r"(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone|people) |how to )?",
    re.I,
)
_MID_SENTENCE = re.compile(r"[\w,][ \t]+$")
_TEMPLATE_TOKEN = re.compile(r"<\|[^|<>]*\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")


@dataclass(frozen=True, kw_only=True)
class Dresser:
    """Dresses safety rows in one style. The same row always gives the same result."""

    style: Style
    abstain: bool = False  # add an option that refuses, and choose it
    translate: Translate | None = None  # for styles whose requests are in another language
    rewrite: Rewrite | None = None  # a model that words the request; None fills the template
    examples: Sequence[str] = ()  # inputs of the style, shown to the model

    def __call__(self, row: Row, where: str) -> dict[str, Any]:
        """Return a new row of the style's kind, without other keys.

        Args:
            row: A request and its refusal.
            where: Names the row in errors.

        Raises:
            DataError: The row has no request or no answer, or the model's rewrite is unusable.
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
        if self.rewrite is not None:
            prompt = self._rewritten(prompt, given.prompt, where)
        exchange = Exchange(style.system, prompt, self._answer(refusal, len(options) - 1))
        return as_row(exchange, style.kind or kind_of(row, where))

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
        shown = "\n".join(_label(style.marker, i) + option for i, option in enumerate(options))
        return style.prefix + request + style.suffix.replace(OPTIONS, shown)

    def _refusal(self, given: Exchange) -> str:
        """Refusal of the row, or one of ours where the style answers in another language."""
        language, refusal = self.style.language, given.answer.strip()
        ours = [line["text"] for line in lines("refusals") if _is_plain(line, language)]
        if ours and language_of(refusal) not in ("", language):
            refusal = chosen(ours, given.prompt)
        if 0 < self.style.answer_words <= SHORT_WORDS:
            first = re.split(r"(?<=[.!?])\s", refusal, maxsplit=1)[0]
            if judges()["refusal"].judge("", first, harmful=True).verdict == Verdict.REFUSED:
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

    def _rewritten(self, prompt: str, request: str, where: str) -> str:
        """Let the model word the prompt, and refuse what is not a prompt about the same thing."""
        assert self.rewrite is not None
        shown = json.dumps(
            {"examples": list(self.examples), "draft": prompt, "request": request},
            ensure_ascii=False,
        )
        turns: list[Message] = [
            {"role": "system", "content": text("rewrite_request")},
            {"role": "user", "content": shown},
        ]
        written = self.rewrite(turns).strip()
        flaws = {
            "it is empty": not written,
            "it holds tokens of a chat template": bool(_TEMPLATE_TOKEN.search(written)),
            "it is a refusal": judges()["refusal"].judge("", written, harmful=True).verdict
            == Verdict.REFUSED,
            "it is much longer": len(written) > MAX_GROWTH * len(prompt),
            "it is in another language": language_of(written)
            not in ("", language_of(prompt), language_of(request)),
            "it keeps no word of the request": not _words(written) & _words(request),
        }
        for flaw, is_so in flaws.items():
            if is_so:
                raise DataError(
                    f"{where}: the model's rewrite cannot be used: {flaw}; "
                    "use another model or leave the rewrite out"
                )
        return written


def _label(marker: str, i: int) -> str:
    """Label of option ``i``, shaped like that of the first one."""
    return re.sub("[Aa1]", lambda first: chr(ord(first[0]) + i), marker, count=1)


def _is_plain(line: dict[str, Any], language: str) -> bool:
    return (line["channel"], line["lang"]) == ("text", language)


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 3}
