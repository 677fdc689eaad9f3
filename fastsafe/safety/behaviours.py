"""Behaviours: what a harmful prompt asks for, and its benign twin.

A behaviour is a pair of texts, not of prompts: a format dresses the text as the input of one task,
so that the same intent can be asked in every format. Its harmful side is expected to be refused,
its benign side to be answered; a benchmark may have one side alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, get_args

from fastsafe.data.records import records
from fastsafe.errors import DataError, nearest

Form = Literal["action", "request"]
FORMS: tuple[Form, ...] = get_args(Form)

# between a passage and the request about it, as HELM renders HarmBench's contextual behaviours
CONTEXT_BREAK = "\n\n---\n\n"

_COLUMNS = ("behavior_id", "harmful", "benign", "category", "form", "context", "lang")


@dataclass(frozen=True)
class Origin:
    """The file that a benchmark's behaviours come from."""

    name: str  # of the benchmark
    sha256: str  # of the file, in hex; of the files one after the other where there are several
    licence: str  # as the benchmark states it; "unknown" where we know of none
    commercial: bool | None  # whether the licence allows commercial use; None: not known
    gated: bool = False  # whether access is granted by hand; never to be passed on


@dataclass(frozen=True)
class Behaviour:
    """One harmful intent and a harmless one with the same words around it."""

    behavior_id: str  # unique in a run: the key that pairs formats, twins and arms
    harmful: str  # e.g. "steal the red car"; "" where there is only a benign side
    benign: str  # its benign twin, e.g. "paint the red car"; "" where there is none
    category: str = ""
    form: Form = "action"  # of both texts: an action phrase, or a whole request
    context: str = ""  # passage that the harmful text speaks of, shown before it
    functional_category: str = ""  # HarmBench's: standard, contextual or copyright
    lang: str = "en"  # of both texts
    origin: Origin | None = None  # None: not from a benchmark
    source_row: int = 0  # in the file of the harmful text, or of the only one, from 1; 0: no file

    def action(self, harmful: bool) -> str:
        """Text of the harmful probe, its context before it, or text of the benign twin."""
        if not harmful:
            return self.benign
        return f"{self.context}{CONTEXT_BREAK}{self.harmful}" if self.context else self.harmful


def read_behaviours(path: str | Path) -> list[Behaviour]:
    """Read behaviours from a file of our own columns; benchmarks have `read_benchmark`.

    Args:
        path: As `records`. Columns ``behavior_id`` (row number when absent), ``harmful`` or
            ``benign`` or both, and, each optional, ``category``, ``form``, ``context``, ``lang``.
            Other columns are refused: a misspelt one would be lost.

    Returns:
        Behaviours in the order of the file, at least one, with unique ids.

    Raises:
        DataError: The file is missing, malformed, empty or repeats an id; the message names the
            row (counted from 1, header excluded).
    """
    rows = (record.row for record in records(Path(path)))
    numbered = enumerate(rows, start=1)
    found = [_behaviour(row, number, f"{path}: row {number}") for number, row in numbered]
    return unique(found, str(path))


def unique(behaviours: list[Behaviour], where: str) -> list[Behaviour]:
    """Return the behaviours.

    Raises:
        DataError: There is none, or an id repeats.
    """
    if not behaviours:
        raise DataError(f"{where}: no behaviours, expected at least one row")
    seen: set[str] = set()
    for each in behaviours:
        if each.behavior_id in seen:
            raise DataError(
                f"{where}: row {each.source_row}: behavior_id {each.behavior_id!r} repeats"
            )
        seen.add(each.behavior_id)
    return behaviours


def seed_behaviours() -> list[Behaviour]:
    """Return the behaviours that ship: short, of our own wording, none tells how.

    Each names a topic and no more; its benign twin has its shape and vocabulary. Apache-2.0.

    Example:
        >>> len(seed_behaviours()) >= 200
        True
    """
    with as_file(files("fastsafe.safety").joinpath("seed", "behaviours.jsonl")) as path:
        return read_behaviours(path)


def _behaviour(row: Mapping[str, Any], number: int, where: str) -> Behaviour:
    if unknown := sorted(set(row) - set(_COLUMNS)):
        raise DataError(f"{where}: unknown column {unknown[0]!r}; {nearest(unknown[0], _COLUMNS)}")
    text: dict[str, Any] = {"benign": ""}
    for column, value in {"behavior_id": str(number), "harmful": "", **row}.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {column} is {type(value).__name__}, expected a string")
        text[column] = value.strip()
    if not text["behavior_id"]:
        raise DataError(f"{where}: behavior_id is empty, expected a phrase")
    if not (text["harmful"] or text["benign"]):
        raise DataError(f"{where}: harmful and benign are empty, expected at least one phrase")
    if text.setdefault("form", "action") not in FORMS:
        raise DataError(f"{where}: form is {text['form']!r}, expected one of {', '.join(FORMS)}")
    return Behaviour(**text, source_row=number)
