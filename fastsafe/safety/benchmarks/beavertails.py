"""BeaverTails (Ji et al. 2023): ``{30k,330k}_{train,test}.jsonl``, also ``.xz``; evaluation set.

Columns ``prompt``, ``response``, ``category`` (14 flags), ``is_safe``. Flags and ``is_safe`` speak
of the response: prompts count as harmful where some response to them was found harmful, and each
stands once, with the categories of all such rows. Names hold commas and come in two spellings,
``a,b`` and ``a,_b``; we write the first. Not for commercial use.

The evaluation set, ``test.json``, has ``prompt``, ``category``, ``category_id``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words

_LICENCE = "CC-BY-NC-4.0 (unverified)"


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield each prompt with a harmful response once, at the place of the first."""
    found: dict[str, tuple[int, set[str]]] = {}
    for number, row in rows(path, "prompt category is_safe"):
        where = f"{path}: row {number}"
        flags = row["category"]
        if not isinstance(flags, Mapping) or not isinstance(row["is_safe"], bool):
            raise DataError(f"{where}: expected flags in category and true or false in is_safe")
        if not row["is_safe"]:
            categories = found.setdefault(words(row, "prompt", where), (number, set()))[1]
            categories.update(_spelt(str(name)) for name, raised in flags.items() if raised)
    for prompt, (number, categories) in found.items():
        category = "; ".join(sorted(categories))
        yield request(f"{origin.name}-{number}", prompt, number, origin, category=category)


def read_evaluation(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of the evaluation set."""
    for number, row in rows(path, "prompt category category_id"):
        where = f"{path}: row {number}"
        category = _spelt(words(row, "category", where))
        prompt = words(row, "prompt", where)
        yield request(f"{origin.name}-{number}", prompt, number, origin, category=category)


def _spelt(category: str) -> str:
    return category.replace(",_", ",")


BENCHMARKS = (
    Benchmark(id="beavertails", licence=_LICENCE, commercial=False, read=read),
    Benchmark(id="beavertails_eval", licence=_LICENCE, commercial=False, read=read_evaluation),
)
