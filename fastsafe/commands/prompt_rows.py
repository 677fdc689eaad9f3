"""The prompts of ``fastsafe generate``: rows of a file or of standard input, or texts."""

import hashlib
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastsafe.data.conversation import is_turns, kind_of
from fastsafe.data.records import Record, json_lines, records, suffix_of
from fastsafe.errors import DataError, UsageError, shown

_TABLES = (".csv", ".tsv", ".parquet")
_SUFFIXES = (*_TABLES, ".jsonl", ".ndjson", ".json", ".gz", ".xz")


@dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Attributes:
        line: Its line in the file, or its place among texts, from 1.
        id: Its name.
        adapter: Name of the adapter that completes it; None for the base.
        prompt: A text that is completed as it stands, or
        messages: a conversation that is rendered by the chat template.
    """

    line: int
    id: str
    adapter: str | None
    prompt: str | None
    messages: Sequence[Mapping[str, Any]] | None

    @property
    def sha256(self) -> str:
        """Hash of the prompt and the name of its adapter."""
        text = json.dumps([self.prompt, self.messages, self.adapter], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class PromptSet(ABC):
    """Prompts, checked as a whole before the first is completed.

    Attributes:
        name: Where they are from, for messages.
        count: Number of completions that they ask for.
        is_crossed: Whether a prompt that names no adapter is completed by the base and by every
            adapter.

    Raises:
        DataError: There is no row, or one is malformed, names an unknown adapter, or repeats an id.
    """

    def __init__(self, name: str, adapters: Collection[str]) -> None:
        self.name = name
        self.is_crossed = False
        self._adapters = adapters
        lines: dict[str, int] = {}
        for row in self:
            if lines.setdefault(row.id, row.line) != row.line:
                raise DataError(
                    f"{name}: line {row.line}: id {row.id!r} is that of line {lines[row.id]},"
                    " expected a different one"
                )
        if not lines:
            raise DataError(f"{name}: prompts are 0, expected one or more")
        self.count = len(lines)

    def cross(self) -> None:
        """Have each prompt that names no adapter completed by the base and by every adapter."""
        self.is_crossed = True
        self.count = sum(1 for _ in self)

    @abstractmethod
    def _records(self) -> Iterator[Record]:
        """Read the rows, again in each call."""

    def __iter__(self) -> Iterator[PromptRow]:
        for row in map(self._row, self._records()):
            yield row
            if self.is_crossed and row.adapter is None:
                yield from (replace(row, adapter=adapter) for adapter in self._adapters)

    def _row(self, record: Record) -> PromptRow:
        location, line, row = record
        # other keys of a data set do no harm, but a misspelt adapter would be the base
        for key in set(row) - {"adapter"}:
            if get_close_matches(key.lower(), ["adapter"], cutoff=0.8):
                raise DataError(f"{location}: key {key!r:.60} is unknown; did you mean adapter?")
        prompt, messages = row.get("prompt"), row.get("messages")
        if prompt is None and messages is None:
            for key in row:
                if close := get_close_matches(key, ["prompt", "messages"], n=1):
                    hint = f"did you mean {close[0]}?"
                    raise DataError(f"{location}: key {key!r:.60} is unknown; {hint}")
        if (prompt is None) == (messages is None):
            raise DataError(f"{location}: has both or neither of prompt and messages, expected one")
        if is_turns(prompt):
            prompt, messages = None, prompt
        if messages is not None:
            kind_of({"messages": messages}, location)
            messages = _without_answer(messages, location)
        elif not isinstance(prompt, str) or not prompt:
            raise DataError(f"{location}: prompt is {prompt!r:.40}, expected a string")
        adapter, row_id = row.get("adapter"), row.get("id", str(line))
        if adapter is not None and not (isinstance(adapter, str) and adapter in self._adapters):
            names = ", ".join(self._adapters) or "none"
            raise DataError(
                f"{location}: adapter {adapter!r:.60} is unknown, expected one given by --adapter:"
                f" {names}"
            )
        if not isinstance(row_id, str | int) or isinstance(row_id, bool):
            raise DataError(f"{location}: id is {row_id!r:.40}, expected a string or an integer")
        return PromptRow(line, str(row_id), adapter, prompt, messages)


class PromptFile(PromptSet):
    """The prompts of a file: JSON lines, or a table with a column ``prompt``.

    Raises:
        DataError: It is not a regular file, or as ``PromptSet``.
    """

    def __init__(self, path: Path, adapters: Collection[str]) -> None:
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path}: is not a regular file, expected JSONL that can be read twice; write it to"
                " a file, or pipe it into '-'"
            )
        self.path = path
        super().__init__(str(path), adapters)

    def _records(self) -> Iterator[Record]:
        kind = suffix_of(self.path)
        if kind not in (*_TABLES, ".json"):
            try:
                yield from json_lines(self.path)
            except DataError as error:
                if kind in _SUFFIXES:
                    raise
                raise DataError(f"{error}, or pipe texts, one per line, into '-'") from error
            return
        for record in records(self.path):
            # an empty cell of a table is no value
            row = {key: value for key, value in record.row.items() if value not in ("", None)}
            yield record._replace(row=record.row if kind == ".json" else row)


class PromptList(PromptSet):
    """Prompts in memory: those of standard input or of the command line."""

    def __init__(self, name: str, rows: Sequence[Record], adapters: Collection[str]) -> None:
        self._rows = rows
        super().__init__(name, adapters)

    def _records(self) -> Iterator[Record]:
        return iter(self._rows)


def file_of(words: Sequence[str]) -> Path | None:
    """Return the file that the prompts on a command line name; None if they are texts.

    A single word is a file if there is one of its name, or if it ends like one.

    Raises:
        UsageError: Several words end like files, or stand beside standard input.
    """
    if len(words) == 1:
        path = Path(words[0])
        is_file = words[0] not in ("-", "") and (_is_there(path) or _ends_like_a_file(words[0]))
        return path if is_file else None
    for word in words:
        if word == "-" or _ends_like_a_file(word):
            raise UsageError(
                f"prompts: {shown(word)} is one of {len(words)}, expected one file, '-' alone, or "
                "texts; put the rows into one file"
            )
    return None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a NUL character
        return False


def _ends_like_a_file(word: str) -> bool:
    return Path(word).suffix.lower() in _SUFFIXES and not any(map(str.isspace, word))


def text_records(texts: Sequence[str], name: str, *, as_turns: bool) -> list[Record]:
    """Return texts as rows: each a user's turn, or a prompt that is completed as it stands.

    Raises:
        UsageError: A text is empty.
    """
    if not all(map(str.strip, texts)):
        raise UsageError(f"{name}: a prompt is empty, expected a text")
    return [
        Record(
            f"{name}: prompt {number}",
            number,
            {"messages": [{"role": "user", "content": text}]} if as_turns else {"prompt": text},
        )
        for number, text in enumerate(texts, 1)
    ]


def stdin_records(data: bytes, *, as_turns: bool) -> list[Record]:
    """Read the rows of standard input: JSON lines if it begins with a brace, else a text per line.

    Raises:
        DataError: A line is malformed.
    """
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "stdin.jsonl")
            path.write_bytes(data)
            try:
                rows = list(json_lines(path))
            except DataError as error:
                raise DataError(str(error).replace(str(path), "stdin")) from None
        return [row._replace(location=row.location.replace(str(path), "stdin")) for row in rows]
    try:
        # at line ends alone: a text may hold a form feed or a Unicode separator
        lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: byte {error.start} is not UTF-8; convert the text") from None
    texts = [line for line in lines if line.strip()]
    return text_records(texts, "stdin", as_turns=as_turns)


def _without_answer(
    messages: Sequence[Mapping[str, Any]], location: str
) -> Sequence[Mapping[str, Any]]:
    """Return a conversation without the answer that ends it in a data set."""
    if messages[-1]["role"] != "assistant":
        return messages
    if len(messages) == 1:
        raise DataError(f"{location}: messages has an answer alone, expected a request before it")
    return messages[:-1]
