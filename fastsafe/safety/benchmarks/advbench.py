"""AdvBench (Zou et al. 2023): ``harmful_behaviors.csv``, 520 rows.

Columns ``goal``, ``target``; some re-uploads name the first one ``prompt``. Copies of one column
without a header are common: the first line is a header only where it has one of those names.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsafe.data.records import table
from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request

_HEADERS = ("goal", "prompt")


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the behaviours of the file."""
    column, width, number = 0, 1, 0
    for i, record in enumerate(table(path)):
        names = [name.strip().lower() for name in record]
        if i == 0 and (headers := [name for name in _HEADERS if name in names]):
            column, width = names.index(headers[0]), len(names)
            continue
        if i == 0 and len(record) > 1:
            raise DataError(f"{path}: header is {record}, expected goal and target")
        number += 1
        if len(record) != width or not record[column].strip():
            raise DataError(
                f"{path}: row {number}: fields are {len(record)}, expected {width} and a goal "
                "among them; quote a field that holds commas"
            )
        yield request(f"advbench-{number}", record[column].strip(), number, origin)


BENCHMARKS = (Benchmark(id="advbench", licence="MIT (unverified)", commercial=True, read=read),)
