"""HarmBench (Mazeika et al. 2024): ``harmbench_behaviors_text_{all,val,test}.csv``.

The files have 400 records on about 1,529 lines, since ``ContextString`` has line breaks. A
contextual behaviour is rendered as in HELM, with its passage first.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, rows, words

_COLUMNS = "Behavior FunctionalCategory SemanticCategory ContextString BehaviorID"


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the behaviours of the file."""
    for location, number, row in rows(path, _COLUMNS):
        yield Behaviour(
            words(row, "BehaviorID", location),
            words(row, "Behavior", location),
            "",
            category=words(row, "SemanticCategory", location),
            form="request",
            context=str(row["ContextString"] or "").strip(),
            functional_category=words(row, "FunctionalCategory", location),
            origin=origin,
            source_row=number,
        )


BENCHMARKS = (Benchmark(id="harmbench", licence="MIT", commercial=True, read=read),)
