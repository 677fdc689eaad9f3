"""Readers of published benchmarks, from the user's local copy to behaviours; no benchmark ships.

There is one file per benchmark, with its quirks in the docstring. A licence followed by
"(unverified)" was not checked at its source; nothing here is legal advice.
"""

from pathlib import Path

from fastsafe.errors import DataError, UsageError
from fastsafe.safety.behaviours import Behaviour, Origin, unique
from fastsafe.safety.plugins import collect, shipped_parts

from ._spec import Benchmark, files_sha256

__all__ = ["Benchmark", "benchmarks", "read_benchmark"]


def benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark by id: the files of this package, then those of entry points.

    Raises:
        UsageError: Two benchmarks have one id, or an entry point names something else.

    Example:
        >>> benchmarks()["xstest"].licence
        'CC-BY-4.0 (unverified)'
    """
    modules = shipped_parts(__name__, __path__, "BENCHMARKS")
    shipped = [benchmark for benchmarks in modules for benchmark in benchmarks]
    return collect(shipped, "fastsafe.benchmarks", Benchmark)


def read_benchmark(name: str, path: str | Path) -> list[Behaviour]:
    """Read the behaviours of a benchmark.

    Args:
        name: Id of a benchmark; see `benchmarks`.
        path: Its file as published, or the folder of its files where it has several.

    Returns:
        Behaviours in the order of the file, each with the file's hash and licence in ``origin``.
        Texts are whole requests in the benchmark's wording.

    Raises:
        UsageError: The name is unknown.
        DataError: The file is missing, has other columns, is malformed, or repeats an id.
    """
    known = benchmarks()
    if name not in known:
        raise UsageError(f"benchmark is {name!r}, expected one of {', '.join(known)}")
    path, benchmark = Path(path), known[name]
    if not path.exists():
        raise DataError(f"{path}: is missing, expected the file of {name}; download it first")
    origin = Origin(
        name=name,
        sha256=files_sha256(path),
        licence=benchmark.licence,
        commercial=benchmark.commercial,
        gated=benchmark.gated,
    )
    return unique(list(benchmark.read(path, origin)), str(path))
