"""BeaverTails (Ji et al. 2023): ``{30k,330k}_{train,test}.jsonl``, also ``.xz``; evaluation set.

Columns ``prompt``, ``response``, ``category`` (14 flags), ``is_safe``. The flags and ``is_safe``
are labels of the response: a prompt counts as harmful where some response to it is unsafe, and is
read once, with the categories of all its unsafe rows. Category names have commas, in two spellings,
``a,b`` and ``a,_b``; the first one is used here. Commercial use is not allowed.

The evaluation set, ``test.json``, has ``prompt``, ``category``, ``category_id``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words

_LICENCE = "CC-BY-NC-4.0 (unverified)"


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield each prompt with an unsafe response once, at its first such row."""
    unsafe: dict[str, tuple[int, set[str]]] = {}
    for location, number, row in rows(path, "prompt category is_safe"):
        flags = row["category"]
        if not isinstance(flags, Mapping) or not isinstance(row["is_safe"], bool):
            raise DataError(f"{location}: expected flags in category and true or false in is_safe")
        if not row["is_safe"]:
            categories = unsafe.setdefault(words(row, "prompt", location), (number, set()))[1]
            categories.update(_spelt(str(name)) for name, raised in flags.items() if raised)
    for prompt, (number, categories) in unsafe.items():
        category = "; ".join(sorted(categories))
        yield request(f"{origin.name}-{number}", prompt, number, origin, category=category)


def read_evaluation(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of the evaluation set."""
    for location, number, row in rows(path, "prompt category category_id"):
        category = _spelt(words(row, "category", location))
        prompt = words(row, "prompt", location)
        yield request(f"{origin.name}-{number}", prompt, number, origin, category=category)


def _spelt(category: str) -> str:
    return category.replace(",_", ",")


BENCHMARKS = (
    Benchmark(id="beavertails", licence=_LICENCE, commercial=False, read=read),
    Benchmark(id="beavertails_eval", licence=_LICENCE, commercial=False, read=read_evaluation),
)
