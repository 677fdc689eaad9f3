"""JailbreakBench (Chao et al. 2024): 100 behaviours of misuse, and 100 benign ones on their topics.

``harmful-behaviors.csv`` and ``benign-behaviors.csv`` with the columns ``Index``, ``Goal``,
``Target``, ``Behavior``, ``Category``, ``Source``. A folder with both gives pairs: rows of one
``Index`` are the two sides of a topic. One file alone gives one side; a file that is not named
benign is harmful.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsafe.errors import DataError, shown
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, rows, words

_Row = tuple[str, int, Mapping[str, Any]]


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the pairs of a folder, or the prompts of one file, in the order of the harmful rows."""
    if not path.is_dir():
        harmful = "benign" not in path.name.lower()
        for index, (location, number, row) in _by_index(path).items():
            goal, category = words(row, "Goal", location), words(row, "Category", location)
            name = f"jailbreakbench-{index}"
            yield request(name, goal, number, origin, harmful=harmful, category=category)
        return
    sides = {}
    for side in ("harmful", "benign"):
        found = sorted(path.glob(f"*{side}*.csv"))
        if len(found) != 1:
            raise DataError(
                f"{path}: holds {len(found)} files *{side}*.csv, expected one of each half; name "
                "one file for that half alone"
            )
        sides[side] = _by_index(found[0])
    harmful_rows, benign_rows = sides["harmful"], sides["benign"]
    if unpaired := harmful_rows.keys() ^ benign_rows.keys():
        raise DataError(
            f"{path}: Index {', '.join(sorted(unpaired)[:5])} is in one half alone, expected the "
            "same in both; download both again"
        )
    for index, (location, number, row) in harmful_rows.items():
        twin_location, _, twin = benign_rows[index]
        yield Behaviour(
            f"jailbreakbench-{index}",
            words(row, "Goal", location),
            words(twin, "Goal", twin_location),
            category=words(row, "Category", location),
            form="request",
            origin=origin,
            source_row=number,
        )


def _by_index(path: Path) -> dict[str, _Row]:
    found: dict[str, _Row] = {}
    for location, number, row in rows(path, "Index Goal Category"):
        index = str(row["Index"]).strip()
        if not index or index in found:
            raise DataError(
                f"{location}: Index is {shown(row['Index'])}, expected one of its own; repair "
                "the file"
            )
        found[index] = location, number, row
    return found


BENCHMARKS = (
    Benchmark(id="jailbreakbench", licence="MIT (unverified)", commercial=True, read=read),
)
