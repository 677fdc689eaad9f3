"""What an OpenAI-compatible endpoint sends back: a completion, or its reason for sending none.

Servers differ in both, and a hostile one may send anything. Every part is therefore read by its
type: what is no text, no number or no list where one belongs counts as absent, and an absent part
makes no verdict.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import inf
from typing import Any

from fastsafe.safety.completers.protocol import Ask, Finish, Reply

MAX_USAGE = 1 << 40  # tokens of one call; a larger number is no usage

_SHOWN_CHARS = 200
_CUT_OFF = {"length", "max_tokens", "max_output_tokens"}
_TEXT_PARTS = (None, "text", "output_text")
# Names of a filter's refusal, without punctuation and what follows a colon: finish reasons, and
# codes of errors (OpenAI, Azure, Bedrock, Anthropic, Gemini, DashScope, Moonshot).
_FILTERED = {"contentfilter", "contentfiltered", "refusal", "safety", "prohibitedcontent"}
_FILTERED |= {"guardrailintervened", "sensitive", "contentpolicyviolation", "moderationblocked"}
_FILTERED |= {"responsibleaipolicyviolation", "datainspectionfailed", "invalidprompt"}
_FILTERED |= {"blocklist", "recitation", "spii"}
_MARKS = ("code", "type", "status")  # keys of an error that may name a filter
# The words of endpoints that have no code for it: text of the row, and then the objection. Words
# about the call itself, such as a setting with "filter" in its name, are none.
_OBJECTION = re.compile(
    r"\b(content|prompt|input|request|response)\b.{0,80}"
    r"(\bfiltered|\bflagged|\bmoderat|\binappropriate|management policy|exists risk|high risk"
    r"|violat.{0,60}(polic|guideline|terms|principle)|(block|reject|refus)\w* .{0,40}safety)"
    r"|content[ _-]?(policy|filter|moderation)|try again with a different prompt",
    re.IGNORECASE | re.DOTALL,
)
_ABOUT_THE_CALL = re.compile(
    r"\b(parameter|param|argument|field|property|schema|extra input|rate limit|quota)s?\b",
    re.IGNORECASE,
)
_UNSUPPORTED_CODES = ("unsupported_parameter", "unsupported_value")
_UNSUPPORTED = re.compile(
    r"unsupported|n[o']t support|unknown|unrecogni|unexpected|not (permitted|allowed)|deprecated"
    r"|extra inputs|temperature.{0,40}(must|only)",
    re.IGNORECASE,
)
# Keys of a call -> what to do where an endpoint does not know them.
_MENDED_BY = {
    "max_tokens": "set max_tokens_name: max_completion_tokens at this endpoint",
    "max_completion_tokens": "set max_tokens_name: max_tokens at this endpoint",
    "temperature": "set temperature: null at this endpoint, which leaves it out",
    "logprobs": "take a judge that reads text, or a model that gives log-probabilities",
    "chat_template_kwargs": "leave chat_template_kwargs out at this endpoint",
}
_MENTIONED = re.compile(r"\b(" + "|".join(_MENDED_BY) + r")\b")


def shown(text: str, secret: str = "") -> str:
    """Return an endpoint's words in quotes: short, escaped, and without the key.

    Example:
        >>> shown("no such\\n\\x1b[31m model")
        "'no such \\\\x1b[31m model'"
    """
    words = " ".join((text.replace(secret, "[key]") if secret else text).split())
    return repr(words if len(words) <= _SHOWN_CHARS else f"{words[:_SHOWN_CHARS]}...")


def parsed(data: bytes) -> Any:
    """Return the JSON value of a reply's body, None for a body that is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def error_words(data: bytes) -> str:
    """Return the endpoint's own words about an error, the begin of the body where it has none."""
    return _words(parsed(data)) or data[: 4 * _SHOWN_CHARS].decode(errors="replace")


def _words(answer: Any, depth: int = 4) -> str:
    if isinstance(answer, str):
        return answer
    if not depth or not isinstance(answer, dict | list):
        return ""
    if isinstance(answer, list):
        return next(filter(None, (_words(part, depth - 1) for part in answer[:8])), "")
    names = ("error", "message", "detail", "msg", "errors")
    words = next(filter(None, (_words(answer.get(name), depth - 1) for name in names)), "")
    # a router's own words are "provider returned error"
    raw = _part(answer, "metadata").get("raw")
    return f"{words}: {raw}" if isinstance(raw, str) else words


def is_filtered(data: bytes, model: str = "") -> bool:
    """Return whether an error says that a content filter did not let the row through.

    Args:
        data: Body of the error.
        model: Name of the model there; the words may repeat it, and it may be that of a filter.
    """
    answer = parsed(data)
    error = _error(answer)
    metadata = _part(error, "metadata")
    if "reasons" in metadata or "flagged_input" in metadata:  # OpenRouter's moderation
        return True
    marks = [part.get(name) for part in (error, _part(error, "innererror")) for name in _MARKS]
    if any(map(_names_a_filter, marks)):
        return True
    words = re.sub(rf"(?<!\w){re.escape(model)}(?!\w)", "", _words(answer)[:1000])
    return bool(_OBJECTION.search(words)) and not _ABOUT_THE_CALL.search(words)


def _names_a_filter(mark: Any) -> bool:
    if not isinstance(mark, str):
        return False
    return re.sub(r"[^a-z]", "", mark.casefold().partition(":")[0]) in _FILTERED


def remedy(data: bytes) -> tuple[str, bool]:
    """Return the setting that mends an error about a key of the call, "" without one.

    The flag says whether the endpoint names the error as one of the settings, so that every row
    would meet it.
    """
    error = _error(parsed(data))
    words, is_certain = error_words(data), error.get("code") in _UNSUPPORTED_CODES
    if not is_certain and not _UNSUPPORTED.search(words):
        return "", False
    # the parameter that it names comes first: the words may name the one to use instead
    found = _MENTIONED.search(f"{error.get('param')} {words}")
    return _MENDED_BY[found[1]] if found else "", is_certain


def _error(answer: Any) -> dict[str, Any]:
    """Return the object that describes an error; some servers wrap it in a list."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, dict):
        return {}
    return error if isinstance(error := answer.get("error"), dict) else answer


def _part(answer: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = answer.get(name)
    return part if isinstance(part, dict) else {}


def choice_of(answer: Any) -> dict[str, Any] | None:
    """Return the first choice of a completion, empty where it is malformed; None without one.

    An answer or a choice that holds an error holds no completion, whatever is beside it.
    """
    if not isinstance(answer, dict) or answer.get("error"):
        return None
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    choice = choices[0] if isinstance(choices[0], dict) else {}
    return None if choice.get("error") or choice.get("finish_reason") == "error" else choice


def read(choice: Mapping[str, Any], ask: Ask) -> Reply:
    """Read a choice; missing parts stay empty, which no judge can read as a verdict."""
    message = _part(choice, "message") or choice
    text, refusal = _text(message.get("content")), message.get("refusal")
    if isinstance(message.get("content"), list):
        refusal = refusal or _joined(message["content"], ("refusal",), "refusal")
    text = text or _text(message.get("text")) or _text(choice.get("text"))
    reasons = [choice.get(f"{name}_reason") for name in ("finish", "stop", "native_finish")]
    if refusal or any(map(_names_a_filter, reasons)):
        return Reply(key=ask.key, text=_text(refusal) or text, finish="refused")
    is_cut = any(isinstance(r, str) and r.casefold() in _CUT_OFF for r in reasons)
    finish: Finish = "length" if is_cut else "stop"
    if not ask.labels:
        return Reply(key=ask.key, text=text, finish=finish)
    logprobs = _first_logprobs(choice.get("logprobs"))
    odds = tuple(logprobs.get(label, -inf) for label in ask.labels)
    return Reply(key=ask.key, logprobs=odds, finish=finish)


def _text(content: Any) -> str:
    """Return the text of a content, whose parts of another kind are no answer."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        content = _joined(parts, _TEXT_PARTS, "text")
    if not isinstance(content, str):
        return ""
    return re.sub("[\ud800-\udfff]", "\ufffd", content)  # halves of a pair are no text


def _joined(parts: list[Any], kinds: tuple[str | None, ...], name: str) -> str:
    """Return the texts under ``name`` of the parts whose type is one of ``kinds``."""
    found = [part for part in parts if isinstance(part, dict) and part.get("type") in kinds]
    return "".join(part[name] for part in found if isinstance(part.get(name), str))


def _first_logprobs(logprobs: Any) -> dict[str, float]:
    """Return the log-probabilities at the first position by token text, outer spaces stripped.

    One that is no number below infinity makes all unreadable; whoever reads them bounds them.
    """
    try:
        if "content" in logprobs:
            pairs = [
                (top["token"], top["logprob"]) for top in logprobs["content"][0]["top_logprobs"]
            ]
        else:
            pairs = list(logprobs["top_logprobs"][0].items())
        best: dict[str, float] = {}
        for token, logprob in pairs:
            if type(logprob) not in (int, float) or not float(logprob) < inf:
                return {}
            best[token.strip()] = max(float(logprob), best.get(token.strip(), -inf))
        return best
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError):
        return {}


def usage(answer: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the tokens in and out that the endpoint states; None where it states no usable one."""
    counts = [
        count
        for name in ("prompt_tokens", "completion_tokens")
        if type(count := _part(answer, "usage").get(name)) is int and 0 <= count <= MAX_USAGE
    ]
    return (counts[0], counts[1]) if len(counts) == 2 else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which may hold a date; None without it."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = _date(value)
        # by the endpoint's own clock where it tells the time
        now = _date(headers.get("date", "")) or datetime.now(UTC)
        return None if until is None else max(0.0, (until - now).total_seconds())
    except OverflowError:  # a zone or a year beyond all dates
        return None


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
