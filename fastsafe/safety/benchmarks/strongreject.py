"""StrongREJECT (Souly et al. 2024): ``strongreject_dataset.csv``, or the small one of 60 rows.

Columns ``category``, ``source``, ``forbidden_prompt``.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the behaviours of the file."""
    for location, number, row in rows(path, "category source forbidden_prompt"):
        prompt, category = (
            words(row, "forbidden_prompt", location),
            words(row, "category", location),
        )
        yield request(f"strongreject-{number}", prompt, number, origin, category=category)


BENCHMARKS = (Benchmark(id="strongreject", licence="MIT (unverified)", commercial=True, read=read),)
