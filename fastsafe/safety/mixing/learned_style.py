"""The style of a fine-tuning set, learned from its rows, for safety rows to copy.

A style holds the system text, the common prefix and suffix of prompts, the layout of options, the
channel of the answers (text, an option's letter, a label, a number, JSON, code), their language and
their lengths. A feature counts as style where at least 60 % of the rows share it; fewer than eight
rows give no prefix or suffix. Source: the idea of Paraphrase in Eiras et al. 2024,
arXiv:2406.10288; the way of learning a style is ours.
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

SHARE = 0.6  # minimum share of rows with a feature of the style
MIN_ROWS = 8  # fewer rows share a prefix or a suffix by chance
SAMPLE = 500  # maximum number of rows read, evenly spaced
MAX_LABELS = 10  # maximum number of distinct answers of a classification
OPTIONS = "\0"  # placeholder of the option lines in a suffix

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
    """The style of the rows of a set."""

    id: str = "learned"
    kind: Kind | None = None  # of rows; None keeps the kind of each safety row
    system: str = ""
    prefix: str = ""  # of prompts
    suffix: str = ""  # of prompts; OPTIONS stands for the option lines
    marker: str = ""  # label of the first option, e.g. "A) "; "" without options
    options: tuple[str, ...] = ()
    channel: Channel = "text"
    label: str = ""  # form of a letter in the answer, for the first option, e.g. "(A)"
    with_text: bool = False  # whether the option's text follows its letter in the answer
    answer_prefix: str = ""  # of answers, up to a colon or a line break, e.g. "Answer: "
    fence: str | None = None  # language of the code fence around answers, None without a fence
    comment: str = ""  # comment marker of the answers' programming language
    keys: tuple[str, ...] = ()  # of JSON answers
    language: str = ""  # of the answers, "" unknown
    request_language: str = ""  # of the text between prefix and suffix, "" unknown
    answer_words: int = 0  # median, 0 unknown


def styles() -> tuple[Style, ...]:
    """Return the shipped prompting styles, which are learned from no rows."""
    shipped = []
    for line in lines("styles"):
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in line.items()
        }
        shipped.append(Style(**fields))
    return tuple(shipped)


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
    sample = range(0, len(rows), step)
    kind = _most_common((kind_of(rows[i], f"user row {i}") for i in sample), 0.0)
    if kind == "text":
        raise DataError(
            "style: the user's rows are running text, expected messages, or prompt and completion; "
            "split each text into its prompt and its answer"
        )
    exchanges = [exchange_of(rows[i], f"user row {i}") for i in sample]
    answers = [exchange.answer for exchange in exchanges]
    prompts = [exchange.prompt.replace(OPTIONS, "") for exchange in exchanges]
    return Style(
        kind=kind,
        system=_most_common((exchange.system for exchange in exchanges), SHARE) or "",
        **_prompt_style(prompts),
        **_answer_style(exchanges),
        answer_words=round(median(len(text.split()) for text in answers)),
    )


def _prompt_style(prompts: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `Style` that describe prompts."""
    style: dict[str, Any] = {}
    blocks = [_OPTION_BLOCK.search(text) for text in prompts]
    if sum(map(bool, blocks)) >= SHARE * len(prompts):
        tables = [_OPTION_LINE.findall(block[0]) for block in blocks if block]
        style["marker"] = _most_common((table[0][0] for table in tables), 0.0)
        count = _most_common((len(table) for table in tables), 0.0) or 0
        style["options"] = tuple(
            _most_common((t[i][1] for t in tables if len(t) > i), SHARE) or _generic_option(i)
            for i in range(count)
        )
        prompts = [
            _without_options(text, block)
            for text, block in zip(prompts, blocks, strict=True)
            if block
        ]
    rows: list[list[str]] = [_PIECE.findall(text) for text in prompts]
    if len(rows) < MIN_ROWS:
        if "options" in style:
            style["suffix"] = f"\n{OPTIONS}"
        return style
    prefix = _common_prefix(rows)
    rows = [pieces[len(prefix) :] for pieces in rows if pieces[: len(prefix)] == prefix]
    suffix = _common_prefix([pieces[::-1] for pieces in rows])[::-1]
    inner = [
        pieces[: len(pieces) - len(suffix)] for pieces in rows if suffix == pieces[-len(suffix) :]
    ]
    style["request_language"] = language_of(" ".join("".join(pieces) for pieces in inner or rows))
    style["prefix"], style["suffix"] = "".join(prefix), "".join(suffix)
    if "options" in style and OPTIONS not in style["suffix"]:
        style["suffix"] = f"\n{OPTIONS}{style['suffix']}"
    return style


def _without_options(text: str, block: re.Match[str]) -> str:
    newline = "\n" if block[0].endswith("\n") else ""
    return f"{text[: block.start()]}{OPTIONS}{newline}{text[block.end() :]}"


def _answer_style(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Return the fields of `Style` that describe answers."""
    answers = [exchange.answer.strip() for exchange in exchanges]
    style: dict[str, Any] = {}
    fences = [_FENCED.fullmatch(text) for text in answers]
    if sum(map(bool, fences)) >= SHARE * len(answers):
        style["fence"] = _most_common((match[1] for match in fences if match), 0.0)
        answers = [match[2].strip() for match in fences if match]
    min_rows = SHARE * len(answers)
    if len(answers) >= MIN_ROWS:
        prefix = "".join(_common_prefix([_PIECE.findall(text) for text in answers]))
        # "The answer is" would make no sentence with a refusal after it, "Answer:" does
        opening = _ANSWER_PREFIX.match(prefix)
        style["answer_prefix"] = opening[0] if opening else ""
    bare = [text.removeprefix(style.get("answer_prefix", "")).strip() for text in answers]
    objects = [keys for text in answers if (keys := _json_keys(text))]
    letters = [match for text in bare if (match := _LETTER_ANSWER.fullmatch(text))]
    if len(objects) >= min_rows:
        style |= {"channel": "json", "keys": _most_common(objects, 0.0), "answer_prefix": ""}
    elif style.get("fence") is not None or sum(bool(_comment(t)) for t in bare) >= min_rows:
        comments = [_comment(text) for text in bare]
        comment = _most_common((c for c in comments if c), 0.0) or "// "
        if style.get("fence"):
            fence = style["fence"].lower()
            comment = next((mark for mark, names in _COMMENTS.items() if fence in names), "// ")
        style |= {"channel": "code", "comment": comment, "answer_prefix": ""}
    elif len(letters) >= min_rows:
        shapes = (_LETTER.sub(lambda m: "A" if m[0].isupper() else "a", m[1]) for m in letters)
        style |= {
            "channel": "letter",
            "label": _most_common(shapes, 0.0),
            "with_text": sum(bool(match[2]) for match in letters) >= SHARE * len(letters),
        }
    elif sum(bool(_NUMBER_ANSWER.fullmatch(text)) for text in bare) >= min_rows:
        style["channel"] = "number"
    elif len(bare) >= MIN_ROWS and _are_labels(bare):
        style["channel"] = "label"
    sentences = answers if style.get("channel", "text") == "text" else [e.prompt for e in exchanges]
    style["language"] = language_of(" ".join(sentences))
    return style


def _common_prefix(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the longest prefix that enough rows share, with at least one piece after it."""
    matching, prefix = list(rows), list[str]()
    while True:
        at = len(prefix)
        heads = Counter(row[at] for row in matching if len(row) > at + 1)
        if not heads:
            return prefix
        piece, count = heads.most_common(1)[0]
        if count < SHARE * len(rows):
            return prefix
        prefix.append(piece)
        matching = [row for row in matching if len(row) > at + 1 and row[at] == piece]


def _most_common(values: Iterable[T], share: float) -> T | None:
    """Return the most common value (the first of a tie) where at least ``share`` have it."""
    counts = Counter(values)
    if not counts:
        return None
    value, count = counts.most_common(1)[0]
    return value if count >= share * counts.total() else None


def _json_keys(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(value) if isinstance(value, dict) else ()


def _comment(text: str) -> str:
    """Return the comment marker of the language that a text opens in, "" where it is no code."""
    if _HASH_CODE.match(text):
        return "# "
    if _DASH_CODE.match(text) and ("from" in text.lower() or ";" in text):
        return "-- "
    return "// " if _SLASH_CODE.match(text) else ""


def _are_labels(answers: Sequence[str]) -> bool:
    labels = {text.casefold() for text in answers}
    are_short = median(len(text.split()) for text in answers) <= 3
    return are_short and len(labels) <= min(MAX_LABELS, len(answers) // 2)


def _generic_option(i: int) -> str:
    """Return an option that fits any request and tells nothing."""
    generic: tuple[str, ...] = next(style.options for style in styles() if style.options)
    return generic[i % len(generic)] + " too" * (i // len(generic))
