"""OR-Bench (Cui et al. 2024): ``or-bench-{80k,hard-1k,toxic}.csv``.

Columns ``prompt``, ``category``. The first two are safe prompts that look otherwise, the third is
harmful; nothing in a file says which it is, so the name does: ``orbench_hard``, ``orbench_toxic``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words


def read(harmful: bool, path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of a file, all harmful or all benign."""
    for number, row in rows(path, "prompt category"):
        where = f"{path}: row {number}"
        text, category = words(row, "prompt", where), words(row, "category", where)
        name = f"{origin.name}-{number}"
        yield request(name, text, number, origin, harmful=harmful, category=category)


BENCHMARKS = tuple(
    Benchmark(id=id, licence="unknown", commercial=None, read=partial(read, harmful))
    for id, harmful in (("orbench_80k", False), ("orbench_hard", False), ("orbench_toxic", True))
)
