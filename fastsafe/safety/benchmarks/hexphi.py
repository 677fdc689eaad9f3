"""HEx-PHI (Qi et al. 2024): a folder of ``category_<n>_<name>.csv``, one of them, or all in one.

Files have one prompt per line and no header, copies may have one; a line with commas may be quoted
or not. A file of another name holds all categories: prompts alone, or a header with a column of
prompts and one whose name begins with "category". Access is granted on request: no copy may be
passed on, and none is ever fetched.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fastsafe.data.prompt_lists import prompt_column, read_prompts
from fastsafe.data.records import records, suffix_of, table
from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request, words

_NAME = re.compile(r"category_([0-9]+)_(.+)\.csv", re.ASCII)


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of all categories, in the order of their numbers."""
    if not path.is_dir() and not _NAME.fullmatch(path.name):
        yield from _in_one(path, origin)
        return
    paths = list(path.glob("category_*.csv")) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"{path}: holds no category_*.csv, expected the folder of HEx-PHI")
    named: list[tuple[int, str, Path]] = []
    for file in paths:
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise DataError(f"{file}: unexpected file name, expected category_<number>_<name>.csv")
        named.append((int(match[1]), match[2], file))
    for category_number, category, file in sorted(named):
        for _, number, prompt in read_prompts(file, joins_fields=True):
            name = f"hexphi-{category_number}-{number}"
            yield request(name, prompt, number, origin, category=category)


def _in_one(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of one file; what its header calls the category is kept."""
    lines = table(path) if suffix_of(path) in (".csv", ".tsv") else iter(())
    names = next(lines, (0, []))[1]
    prompts = prompt_column(names)
    category = next((name for name in names if name.strip().lower().startswith("category")), None)
    if prompts is None or category is None:
        for _, number, prompt in read_prompts(path, joins_fields=True):
            yield request(f"hexphi-{number}", prompt, number, origin)
        return
    for number, (location, _, row) in enumerate(records(path), start=1):
        prompt, kind = words(row, prompts, location), words(row, category, location)
        yield request(f"hexphi-{number}", prompt, number, origin, category=kind)


BENCHMARKS = (
    Benchmark(
        id="hexphi",
        licence="HEx-PHI's own terms (unverified)",
        commercial=None,
        read=read,
        gated=True,
    ),
)
