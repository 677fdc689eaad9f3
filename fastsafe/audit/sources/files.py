"""Read behaviours and rows from files, and from what ships where a recipe names none."""

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsafe.audit.recipe.schema import Data
from fastsafe.errors import DataError
from fastsafe.io import hub
from fastsafe.io.digest import file_sha256
from fastsafe.safety.behaviours import Behaviour
from fastsafe.safety.completers.protocol import Completer

if TYPE_CHECKING:
    from fastsafe.safety.formats import TranslationTable

OpenCompleter = Callable[[str], Completer]  # checkpoint folder or hub id -> who answers with it


def no_completer(checkpoint: str) -> Completer:
    """Refuse to open a checkpoint: for callers that never translate."""
    raise DataError(
        f"data.translator: is {checkpoint!r}, and no model can be opened here; expected "
        "translations from a file; run it within fastsafe audit"
    )


def data_hashes(data: Data) -> dict[str, str]:
    """Return the sha256 of every local file that the recipe's section names, by its key."""
    named = {f"data.{key}": getattr(data, key) for key in ("behaviours", "safety", "translations")}
    named |= {f"data.tasks.{task}": path for task, path in data.tasks.items()}
    paths = {key: Path(path).expanduser() for key, path in named.items() if path}
    return {key: file_sha256(path) for key, path in paths.items() if path.is_file()}


class FilesSource:
    """Behaviours, task rows and safety rows by path; the seed set and the miniatures by default.

    A hash of each behaviour's id decides whether it is a probe or makes safety rows, half of them
    each, so that no probe is ever trained on. With a file of safety rows all are probes.
    """

    id = "files"

    def __init__(self, data: Data, open_completer: OpenCompleter = no_completer) -> None:
        """Remember the files; nothing is read yet.

        Args:
            data: The recipe's section.
            open_completer: Opens the checkpoint that ``data.translator`` names.
        """
        self._data = data
        self._open_completer = open_completer

    @cached_property
    def _behaviours(self) -> Sequence[Behaviour]:
        from fastsafe.safety.behaviours import read_behaviours, seed_behaviours
        from fastsafe.safety.benchmarks import read_benchmark

        if self._data.behaviours is None:
            return seed_behaviours()
        if self._data.benchmark is None:
            return read_behaviours(self._data.behaviours)
        return read_benchmark(self._data.benchmark, self._data.behaviours)

    def behaviours(self, n: int, seed: int) -> Sequence[Behaviour]:
        """Return up to ``n`` behaviours that make no safety row.

        Raises:
            DataError: There is none.
        """
        # a behaviour with a benign side alone makes no safety row: it is always a probe
        pool = [
            b
            for b in self._behaviours
            if self._data.safety or not (b.harmful and _is_for_training(b))
        ]
        if not pool:
            raise self._too_few("probes")
        return _shuffled(pool, seed)[:n]

    def task_rows(
        self, task: str, n: int, split: Literal["train", "test"], seed: int
    ) -> Sequence[dict[str, Any]]:
        """Return rows of the task's file, or of the shipped miniature, which may have fewer.

        Raises:
            DataError: The file is malformed or has too few rows.
        """
        from fastsafe.safety.tasks import load_rows, tasks

        path = self._data.tasks.get(task)
        if path is not None:
            return load_rows(tasks()[task], _one_file(path), split, n, seed)
        return load_rows(tasks()[task], None, split, None, seed)[:n]

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return requests in this format with refusals of varied wordings.

        Raises:
            DataError: The file of safety rows holds too few, or another format is asked of it.
        """
        if self._data.safety is not None:
            return self._safety_file(format, n, seed)
        from fastsafe.safety.mixing.safety_rows import safety_rows_from

        pool = _shuffled([b for b in self._behaviours if _is_for_training(b) and b.harmful], seed)
        if not pool:
            raise self._too_few("safety rows")
        rows: list[dict[str, Any]] = []
        for round_ in range(-(-n // len(pool))):
            # every behaviour once before any comes again, with another refusal
            rows += safety_rows_from(pool, [format], translate=self.translate, seed=seed + round_)
        return rows[:n]

    def _too_few(self, what: str) -> DataError:
        return DataError(
            f"{self._data.behaviours}: holds {len(self._behaviours)} behaviours, of which none is "
            f"left for {what}; about half make probes and the other half safety rows: give more "
            "harmful ones, or safety rows as data.safety"
        )

    def _safety_file(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        from fastsafe.data.exchange import as_row, exchange_of
        from fastsafe.data.readers import read_rows

        path = self._data.safety or ""
        if format != "plain":
            raise DataError(
                f"{path}: safety rows are asked for in format {format}, expected plain: a file is "
                "mixed in as it is; use mitigation plain, longest, paraphrase or mixed, or leave "
                "data.safety out"
            )
        file = read_rows(path)
        rows = []
        for row, location in zip(file.rows, file.locations, strict=True):
            exchange = exchange_of(row, location)
            turns = row.get("messages", ())
            if row.get("tools") or any("tool_calls" in t or "weight" in t for t in turns):
                raise DataError(
                    f"{location}: row has tools, tool calls or weights, expected a plain request "
                    "and its refusal; correct or remove it"
                )
            if not (exchange.prompt and exchange.answer):
                raise DataError(
                    f"{location}: expected a request and its refusal; correct or remove it"
                )
            rows.append(as_row(exchange, "messages"))
        if len(rows) < n:
            raise DataError(f"{path}: holds {len(rows)} safety rows, expected {n}; lower the share")
        return _shuffled(rows, seed)[:n]

    def translate(self, text: str) -> str:
        """Return a request in the language of the translation format."""
        return self.translator(text)

    @cached_property
    def translator(self) -> "TranslationTable":
        """Translator of actions; a model is opened when the first translation is needed."""
        from fastsafe.safety.formats import TranslationTable, seed_translator

        if self._data.translator is not None:
            completer = self._open_completer(self._data.translator)
            both = [b.action(is_harmful) for b in self._behaviours for is_harmful in (True, False)]
            return TranslationTable.by_model(completer, [text for text in both if text])
        path = self._data.translations
        return seed_translator() if path is None else TranslationTable.read(path)


def _one_file(source: str) -> Path:
    files = hub.resolve_data(source)
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise DataError(
            f"{source}: has several files ({names}), expected one; add ':' and its path"
        )
    return files[0]


def _is_for_training(behaviour: Behaviour) -> bool:
    return random.Random(f"split {behaviour.behavior_id}").random() < 0.5


def _shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    shuffled = list(items)
    random.Random(f"files {seed}").shuffle(shuffled)
    return shuffled
