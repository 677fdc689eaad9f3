"""OR-Bench (Cui et al. 2024): ``or-bench-{80k,hard-1k,toxic}.csv``.

Columns ``prompt``, ``category``. The first two files have safe prompts that seem toxic, the third
one has toxic prompts. No column distinguishes them, so each file is a benchmark of its own:
``orbench_80k``, ``orbench_hard``, ``orbench_toxic``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words


def read(harmful: bool, path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of a file, all harmful or all benign."""
    for location, number, row in rows(path, "prompt category"):
        text, category = words(row, "prompt", location), words(row, "category", location)
        name = f"{origin.name}-{number}"
        yield request(name, text, number, origin, harmful=harmful, category=category)


BENCHMARKS = tuple(
    Benchmark(id=id, licence="unknown", commercial=None, read=partial(read, harmful))
    for id, harmful in (("orbench_80k", False), ("orbench_hard", False), ("orbench_toxic", True))
)
