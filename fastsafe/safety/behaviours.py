"""Behaviours: pairs of a harmful text and its benign twin.

A behaviour holds texts, not prompts: a format renders a text as the input of one task, so that the
same intent can be asked in every format. The harmful side is expected to be refused, the benign
side to be answered; behaviours of a benchmark may have one side alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, get_args

from fastsafe.data.prompt_lists import prompt_column
from fastsafe.data.records import records
from fastsafe.errors import DataError, nearest, shown

Form = Literal["action", "request"]
FORMS: tuple[Form, ...] = get_args(Form)

# separates a passage from its request, as in HELM's rendering of HarmBench's contextual behaviours
CONTEXT_BREAK = "\n\n---\n\n"

_COLUMNS = ("behavior_id", "harmful", "benign", "category", "form", "context", "lang")


@dataclass(frozen=True)
class Origin:
    """The file of a benchmark, with its licence."""

    name: str  # of the benchmark
    sha256: str  # in hex; of a folder: over the hashes of its files
    licence: str  # as the benchmark states it; "unknown" where none is known
    commercial: bool | None  # whether the licence allows commercial use; None: unknown
    gated: bool = False  # whether access is granted on request; such a file must not be shared


@dataclass(frozen=True)
class Behaviour:
    """One harmful intent and its benign twin."""

    behavior_id: str  # unique in a run; pairs formats, twins and arms
    harmful: str  # e.g. "steal the red car"; "" for a benign side alone
    benign: str  # e.g. "paint the red car"; "" for a harmful side alone
    category: str = ""
    form: Form = "action"  # of both texts: an action phrase, or a whole request
    context: str = ""  # passage that the harmful text refers to, shown before it
    functional_category: str = ""  # HarmBench's: standard, contextual or copyright
    lang: str = "en"  # of both texts
    origin: Origin | None = None  # None: not from a benchmark
    source_row: int = (
        0  # row of the harmful text (of a lone benign one) in its file, from 1; 0: none
    )

    def action(self, harmful: bool) -> str:
        """Return the harmful text after its context, or the benign text."""
        if not harmful:
            return self.benign
        return f"{self.context}{CONTEXT_BREAK}{self.harmful}" if self.context else self.harmful


def read_behaviours(path: str | Path) -> list[Behaviour]:
    """Read behaviours from a file with fastsafe's columns; `read_benchmark` reads benchmarks.

    Args:
        path: As `records`. Columns ``behavior_id`` (row number when absent), ``harmful`` or
            ``benign`` or both, and, each optional, ``category``, ``form``, ``context``, ``lang``.
            Other columns are an error, since a misspelt one would be ignored.

    Returns:
        Behaviours in the order of the file, at least one, with unique ids.

    Raises:
        DataError: The file is missing, malformed, empty or repeats an id; the message names the
            row (counted from 0, header excluded).
    """
    numbered = enumerate(records(Path(path)), start=1)
    found = [_behaviour(record.row, number, record.location) for number, record in numbered]
    return unique(found, str(path))


def unique(behaviours: list[Behaviour], location: str) -> list[Behaviour]:
    """Return the behaviours, checked for unique ids.

    Raises:
        DataError: The list is empty, or an id repeats.
    """
    if not behaviours:
        raise DataError(f"{location}: no behaviours, expected at least one row")
    seen: set[str] = set()
    for behaviour in behaviours:
        name, row = behaviour.behavior_id, behaviour.source_row
        if name in seen:
            raise DataError(f"{location}: row {row - 1}: behavior_id {shown(name)} repeats")
        seen.add(name)
    return behaviours


def seed_behaviours() -> list[Behaviour]:
    """Return the shipped behaviours, in our own wording, Apache-2.0.

    Each names a topic and no method; its benign twin has the same shape and vocabulary.

    Example:
        >>> len(seed_behaviours()) >= 200
        True
    """
    with as_file(files("fastsafe.safety").joinpath("seed", "behaviours.jsonl")) as path:
        return read_behaviours(path)


def _behaviour(row: Mapping[str, Any], number: int, location: str) -> Behaviour:
    row = {column: value for column, value in row.items() if value is not None}
    if unknown := sorted(set(row) - set(_COLUMNS)):
        prompts = None if "harmful" in row or "benign" in row else prompt_column(unknown)
        remedy = "call it harmful, or name the benchmark of the file in data.benchmark"
        if prompts is None:
            remedy = nearest(unknown[0], _COLUMNS)
        raise DataError(f"{location}: unknown column {shown(prompts or unknown[0])}; {remedy}")
    text: dict[str, Any] = {"benign": ""}
    for column, value in {"behavior_id": str(number), "harmful": "", **row}.items():
        if not isinstance(value, str):
            raise DataError(f"{location}: {column} is {type(value).__name__}, expected a string")
        text[column] = value.strip()
    if not text["behavior_id"]:
        raise DataError(f"{location}: behavior_id is empty, expected a phrase")
    if not (text["harmful"] or text["benign"]):
        raise DataError(f"{location}: harmful and benign are empty, expected at least one phrase")
    if text.setdefault("form", "action") not in FORMS:
        raise DataError(
            f"{location}: form is {shown(text['form'])}, expected one of {', '.join(FORMS)}"
        )
    return Behaviour(**text, source_row=number)
