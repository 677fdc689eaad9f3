"""The style of a fine-tuning set, learned from its rows: what a safety row must look like.

Learned are the system text, what all prompts begin and end with, the layout of options, the
channel of the answers (text, an option's letter, a label, a number, JSON, code), their language
and lengths. Anything counts as style that at least six rows of ten share; fewer than eight rows
tell nothing about what prompts share. Source: the idea of Paraphrase in Eiras et al. 2024,
arXiv:2406.10288; how it is learned is ours.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, TypeVar

from fastsafe.data.conversation import Kind, Row, kind_of
from fastsafe.data.exchange import Exchange, exchange_of
from fastsafe.errors import DataError
from fastsafe.safety.texts import lines
from fastsafe.safety.texts.language import language_of

Channel = Literal["text", "letter", "label", "number", "json", "code"]
T = TypeVar("T")

SHARE = 0.6  # of the rows that must have something for it to be style
MIN_ROWS = 8  # fewer share a beginning or an end by chance
SAMPLE = 500  # rows looked at, evenly spaced
MAX_LABELS = 10  # distinct short answers that still are labels
OPTIONS = "\0"  # where the option lines stand in a suffix

_LABEL = r"[\[(]?(?:[A-Ha-h]|[1-8])(?:[\])]|[.:])[).:]?"
_OPTION_LINE = re.compile(rf"^[ \t]*({_LABEL}[ \t]+)(\S[^\n]*)$", re.M)
_OPTION_BLOCK = re.compile(rf"(?:^[ \t]*{_LABEL}[ \t]+\S[^\n]*(?:\n|\Z)){{2,8}}", re.M)
_LETTER_ANSWER = re.compile(
    r"([\[(]?[A-Ha-h](?:[\]).:]+(?=[ \t]+\S|$))?)(?:(?<![A-Ha-h])[ \t]+(\S.*))?", re.S
)
_ANSWER_PREFIX = re.compile(r".*[:\n]\s*", re.S)
_LETTER = re.compile("[A-Ha-h]")
_NUMBER_ANSWER = re.compile(r"(?:.*####\s*)?[-+$]?[0-9][0-9,]*(?:\.[0-9]+)?%?\.?", re.S)
_FENCED = re.compile(r"\s*```([\w+#-]*)[ \t]*\n(.*?)\n?```\s*", re.S)
_HASH_CODE = re.compile(
    r"\s*(?:def \w+\s*\(|class \w+\s*[(:]|import [\w.]+\s*$|from [\w.]+ import|print\(|#!)", re.M
)
_DASH_CODE = re.compile(r"\s*(?:select|insert into|create table|update)\b.*;?", re.I)
_SLASH_CODE = re.compile(
    r"\s*(?:#include|using \w|(?:public|private|static|export|async)\s|function\s*\w*\(|func \w"
    r"|fn \w|(?:const|let|var)\s+\w+\s*=)"
)
_COMMENTS = {
    "# ": ("python", "py", "python3", "ruby", "rb", "bash", "sh", "shell", "r", "perl", "yaml"),
    "-- ": ("sql", "lua", "haskell"),
}
_PIECE = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the rows of a set are dressed."""

    id: str = "learned"
    kind: Kind | None = None  # of rows; None keeps that of each safety row
    system: str = ""
    prefix: str = ""  # of prompts
    suffix: str = ""  # of prompts; OPTIONS stands for the option lines
    marker: str = ""  # how the first option is labelled, e.g. "A) "; "" without options
    options: tuple[str, ...] = ()
    channel: Channel = "text"
    label: str = ""  # how a letter stands in the answer, for the first option, e.g. "(A)"
    with_text: bool = False  # whether the option's text follows its letter in the answer
    answer_prefix: str = ""  # of answers, up to a colon or a line break, e.g. "Answer: "
    fence: str | None = None  # language of the code fence around answers, None without a fence
    comment: str = ""  # what opens a comment of the answers' programming language
    keys: tuple[str, ...] = ()  # of JSON answers
    language: str = ""  # of the answers, "" unknown
    request_language: str = ""  # of what stands between prefix and suffix, "" unknown
    prompt_words: int = 0  # median, 0 unknown
    answer_words: int = 0  # median, 0 unknown


def styles() -> tuple[Style, ...]:
    """Return the prompting styles that are known without any rows."""
    found = []
    for line in lines("styles"):
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in line.items()
        }
        found.append(Style(**values))
    return tuple(found)


def learn(rows: Sequence[Row]) -> Style:
    """Learn the style of a set.

    Args:
        rows: Of one kind with prompts and answers; at least one.

    Raises:
        DataError: There are no rows, one is malformed, or they are running text or token ids.
    """
    if not rows:
        raise DataError("style: the user's rows are 0, expected one or more; supply them")
    step = -(-len(rows) // SAMPLE)
    picked = range(0, len(rows), step)
    kind = _common((kind_of(rows[i], f"user row {i}") for i in picked), 0.0)
    if kind == "text":
        raise DataError(
            "style: the user's rows are running text, expected messages, or prompt and completion; "
            "split each text into its prompt and its answer"
        )
    exchanges = [exchange_of(rows[i], f"user row {i}") for i in picked]
    answers = [each.answer for each in exchanges]
    prompts = [each.prompt.replace(OPTIONS, "") for each in exchanges]
    return Style(
        kind=kind,
        system=_common((each.system for each in exchanges), SHARE) or "",
        prompt_words=round(median(len(text.split()) for text in prompts)),
        **_of_prompts(prompts),
        **_of_answers(exchanges),
        answer_words=round(median(len(text.split()) for text in answers)),
    )


def _of_prompts(prompts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    blocks = [_OPTION_BLOCK.search(text) for text in prompts]
    if sum(map(bool, blocks)) >= SHARE * len(prompts):
        tables = [_OPTION_LINE.findall(block[0]) for block in blocks if block]
        found["marker"] = _common((table[0][0] for table in tables), 0.0)
        count = _common((len(table) for table in tables), 0.0) or 0
        found["options"] = tuple(
            _common((t[i][1] for t in tables if len(t) > i), SHARE) or _stand_in(i)
            for i in range(count)
        )
        prompts = [
            text[: block.start()] + OPTIONS + "\n" * block[0].endswith("\n") + text[block.end() :]
            for text, block in zip(prompts, blocks, strict=True)
            if block
        ]
    pieces: list[list[str]] = [_PIECE.findall(text) for text in prompts]
    if len(pieces) < MIN_ROWS:
        if "options" in found:
            found["suffix"] = f"\n{OPTIONS}"
        return found
    prefix = _shared(pieces)
    pieces = [each[len(prefix) :] for each in pieces if each[: len(prefix)] == prefix]
    suffix = _shared([each[::-1] for each in pieces])[::-1]
    inner = [each[: len(each) - len(suffix)] for each in pieces if suffix == each[-len(suffix) :]]
    found["request_language"] = language_of(" ".join("".join(each) for each in inner or pieces))
    found["prefix"], found["suffix"] = "".join(prefix), "".join(suffix)
    if "options" in found and OPTIONS not in found["suffix"]:
        found["suffix"] = f"\n{OPTIONS}{found['suffix']}"
    return found


def _of_answers(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    answers = [each.answer.strip() for each in exchanges]
    found: dict[str, Any] = {}
    fences = [_FENCED.fullmatch(text) for text in answers]
    if sum(map(bool, fences)) >= SHARE * len(answers):
        found["fence"] = _common((match[1] for match in fences if match), 0.0)
        answers = [match[2].strip() for match in fences if match]
    least = SHARE * len(answers)
    if len(answers) >= MIN_ROWS:
        shared = "".join(_shared([_PIECE.findall(text) for text in answers]))
        # "The answer is" would make no sentence with a refusal after it, "Answer:" does
        opening = _ANSWER_PREFIX.match(shared)
        found["answer_prefix"] = opening[0] if opening else ""
    bare = [text.removeprefix(found.get("answer_prefix", "")).strip() for text in answers]
    objects = [keys for text in answers if (keys := _keys(text))]
    letters = [match for text in bare if (match := _LETTER_ANSWER.fullmatch(text))]
    if len(objects) >= least:
        found |= {"channel": "json", "keys": _common(objects, 0.0), "answer_prefix": ""}
    elif found.get("fence") is not None or sum(bool(_comment(t)) for t in bare) >= least:
        comments = [_comment(text) for text in bare]
        comment = _common((c for c in comments if c), 0.0) or "// "
        if found.get("fence"):
            known = (mark for mark, names in _COMMENTS.items() if found["fence"].lower() in names)
            comment = next(known, "// ")
        found |= {"channel": "code", "comment": comment, "answer_prefix": ""}
    elif len(letters) >= least:
        shapes = (_LETTER.sub(lambda m: "A" if m[0].isupper() else "a", m[1]) for m in letters)
        found |= {
            "channel": "letter",
            "label": _common(shapes, 0.0),
            "with_text": sum(bool(match[2]) for match in letters) >= SHARE * len(letters),
        }
    elif sum(bool(_NUMBER_ANSWER.fullmatch(text)) for text in bare) >= least:
        found["channel"] = "number"
    elif len(bare) >= MIN_ROWS and _are_labels(bare):
        found["channel"] = "label"
    sentences = answers if found.get("channel", "text") == "text" else [e.prompt for e in exchanges]
    found["language"] = language_of(" ".join(sentences))
    return found


def _shared(pieces: Sequence[Sequence[str]]) -> list[str]:
    """Longest beginning that enough rows share; each of them keeps at least one word after it."""
    alive, found = list(pieces), list[str]()
    while True:
        at = len(found)
        heads = Counter(each[at] for each in alive if len(each) > at + 1)
        piece, count = (*heads.most_common(1), ("", 0))[0]
        if count < SHARE * len(pieces):
            return found
        found.append(piece)
        alive = [each for each in alive if len(each) > at + 1 and each[at] == piece]


def _common(values: Iterable[T], share: float) -> T | None:
    """Most common value where at least ``share`` of all have it, the first of equals."""
    counts = Counter(values)
    for value, count in counts.most_common(1):
        return value if count >= share * counts.total() else None
    return None


def _keys(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(value) if isinstance(value, dict) else ()


def _comment(text: str) -> str:
    """Mark of comments of the language that a text opens in, "" where it is no code."""
    if _HASH_CODE.match(text):
        return "# "
    if _DASH_CODE.match(text) and ("from" in text.lower() or ";" in text):
        return "-- "
    return "// " if _SLASH_CODE.match(text) else ""


def _are_labels(answers: Sequence[str]) -> bool:
    kinds = {text.casefold() for text in answers}
    short = median(len(text.split()) for text in answers) <= 3
    return short and len(kinds) <= min(MAX_LABELS, len(answers) // 2)


def _stand_in(i: int) -> str:
    """Text of an option that fits any request and tells nothing."""
    known: tuple[str, ...] = next(style.options for style in styles() if style.options)
    return known[i % len(known)] + " too" * (i // len(known))
