"""Read lists of prompts: one column of a table or of JSON rows, or one prompt per line.

Published lists are copied with and without a header, with another header, with the index of pandas,
and as JSON. A header or JSON is never taken for a prompt.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastsafe.data.records import records, suffix_of, table, text_lines
from fastsafe.errors import DataError, shown

# names of the column of prompts in published lists, by precedence; case and spaces do not matter
PROMPT_COLUMNS = (
    "goal",
    "behavior",
    "behaviour",
    "forbidden_prompt",
    "harmful",
    "prompt",
    "query",
    "question",
    "instruction",
    "request",
    "text",
)
_PLURALS = ("harmful_behavior", "harmful_behaviour", "harmful_prompt", "adversarial_prompt")
_TABLES = (".csv", ".tsv")


class ListedPrompt(NamedTuple):
    """One prompt of a list."""

    location: str  # prefix of errors
    number: int  # of the row, from 1, header excluded
    text: str


def read_prompts(path: Path, *, joins_fields: bool = False) -> Iterator[ListedPrompt]:
    """Read the prompts of a list.

    Args:
        path: .txt (one prompt per line), .csv or .tsv with or without a header, or rows as
            `records` reads them.
        joins_fields: Whether lines of a table with one column may hold commas that are not quoted.

    Raises:
        DataError: The file is malformed, has no column of prompts, or holds JSON under another
            name.
    """
    kind = suffix_of(path)
    if kind == ".txt":
        yield from _in_table([(n, [text]) for n, text in text_lines(path)], path, joins_fields=True)
    elif kind in _TABLES:
        yield from _in_table(table(path), path, joins_fields=joins_fields)
    else:
        for number, (location, _, row) in enumerate(records(path), start=1):
            column = prompt_column(row)
            text = row.get(column or "")
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"{location}: keys are {', '.join(row)!a:.200}, expected a text under one of "
                    f"{', '.join(PROMPT_COLUMNS)}; rename the key of the prompts"
                )
            yield ListedPrompt(location, number, text.strip())


def prompt_column(names: Iterable[Any]) -> str | None:
    """Return the name of the column of prompts, None without one."""
    known = {_plain(name): str(name) for name in names}
    return next((known[name] for name in (*PROMPT_COLUMNS, *_PLURALS) if name in known), None)


def _plain(name: Any) -> str:
    plain = "_".join(str(name).casefold().split())
    return plain if plain in PROMPT_COLUMNS else plain.removesuffix("s")


def _in_table(
    lines: Iterable[tuple[int, list[str]]], path: Path, *, joins_fields: bool
) -> Iterator[ListedPrompt]:
    column, width, number = 0, 1, 0
    for i, (line, fields) in enumerate(lines):
        location = f"{path}: row {number}, line {line}"
        if i == 0 and (header := prompt_column(fields)) is not None:
            column, width = fields.index(header), len(fields)
            continue
        if width == 1 and joins_fields:
            fields = [",".join(fields)]  # an unquoted line with commas was split
        if i == 0 and suffix_of(path) in _TABLES:
            _check_first(fields, location)
        number += 1
        if joins_fields and not fields[0].strip():
            continue
        if len(fields) != width or not fields[column].strip():
            raise DataError(
                f"{location}: fields are {len(fields)}, expected {width} and a prompt among them; "
                "quote a field that holds commas"
            )
        text = fields[column].strip()
        if _is_json(text):
            raise DataError(
                f"{location}: prompt is {shown(text)}, which is JSON, expected plain text; call "
                "the file .jsonl"
            )
        yield ListedPrompt(location, number, text)


def _check_first(fields: list[str], location: str) -> None:
    """Refuse a first line that is a header without a known name.

    Raises:
        DataError: It has several fields, or one word.
    """
    if len(fields) > 1 or len(fields[0].split()) == 1:
        raise DataError(
            f"{location}: header is {', '.join(fields)!a:.200}, expected a prompt, or a header "
            f"with one of {', '.join(PROMPT_COLUMNS)}; rename the column of prompts"
        )


def _is_json(text: str) -> bool:
    if not text.startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
