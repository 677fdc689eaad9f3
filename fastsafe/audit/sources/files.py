"""Data from files, and from what ships with fastsafe where a recipe names none."""

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsafe.audit.recipe.schema import Data
from fastsafe.errors import DataError
from fastsafe.io import hub
from fastsafe.safety.behaviours import Behaviour

if TYPE_CHECKING:
    from fastsafe.safety.formats import Pairs


class FilesSource:
    """Behaviours, task rows and safety rows by path; the seed set and the miniatures by default.

    Behaviours are parted once and for all by their ids: half are probes, half make safety rows,
    so that no probe is ever trained on. A file of safety rows leaves all behaviours to the probes.
    """

    id = "files"

    def __init__(self, data: Data, device: str = "cpu") -> None:
        self._data = data
        self._device = device  # of a model that translates

    def checkpoint(self) -> Path | None:
        """Return None: files belong to no checkpoint."""
        return None

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
        """Return ``n`` behaviours that make no safety row; all where they are fewer.

        Raises:
            DataError: There is none.
        """
        # a benign side alone makes no safety row
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
        """Return rows of the task's file; of a miniature as many as it has.

        Raises:
            DataError: The file is malformed or has too few rows.
        """
        from fastsafe.safety.tasks import load_rows, tasks

        path = self._data.tasks.get(task)
        if path is not None:
            return load_rows(tasks()[task], _one_file(path), split, n, seed)
        return load_rows(tasks()[task], None, split, None, seed)[:n]

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[dict[str, Any]]:
        """Return requests in this format, each refused; wordings of refusals vary.

        Raises:
            DataError: The file of safety rows holds too few, or another format is asked of it.
        """
        if self._data.safety is not None:
            return self._safety_file(format, n, seed)
        from fastsafe.safety.mixing.safety_rows import safety_rows_from

        pool = _shuffled([b for b in self._behaviours if _is_for_training(b) and b.harmful], seed)
        if not pool:
            raise self._too_few("safety rows")
        found: list[dict[str, Any]] = []
        for round_ in range(-(-n // len(pool))):
            # every behaviour once before any comes again, with another refusal
            found += safety_rows_from(pool, [format], translate=self.translate, seed=seed + round_)
        return found[:n]

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
        found = read_rows(path)
        rows = []
        for row, where in zip(found.rows, found.locations, strict=True):
            exchange = exchange_of(row, where)
            if not (exchange.prompt and exchange.answer):
                raise DataError(f"{where}: expected a request and its refusal; mend or remove it")
            rows.append(as_row(exchange, "messages"))
        if len(rows) < n:
            raise DataError(f"{path}: holds {len(rows)} safety rows, expected {n}; lower the share")
        return _shuffled(rows, seed)[:n]

    def translate(self, text: str) -> str:
        """Return a request in the language of the translation format."""
        return self.translator(text)

    @cached_property
    def translator(self) -> "Pairs":
        """Who translates; a model is asked when the first translation is wanted."""
        from fastsafe.safety.formats import Pairs, seed_translator

        if self._data.translator is not None:
            from fastsafe.audit.backend.completer import CheckpointCompleter

            completer = CheckpointCompleter(self._data.translator, device=self._device)
            both = [b.action(is_harmful) for b in self._behaviours for is_harmful in (True, False)]
            return Pairs.by_model(completer, [text for text in both if text])
        path = self._data.translations
        return seed_translator() if path is None else Pairs.read(path)


def _one_file(source: str) -> Path:
    found = hub.resolve_data(source)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise DataError(
            f"{source}: has several files ({names}), expected one; add ':' and its path"
        )
    return found[0]


def _is_for_training(behaviour: Behaviour) -> bool:
    return random.Random(f"split {behaviour.behavior_id}").random() < 0.5


def _shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    found = list(items)
    random.Random(f"files {seed}").shuffle(found)
    return found
