"""HEx-PHI (Qi et al. 2024): a folder of ``category_<n>_<name>.csv``, or one of its files.

Files have one prompt per line and no header, copies may have one; a line with commas may be quoted
or not. Access is granted on request: no copy may be passed on, and none is ever fetched.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fastsafe.data.prompt_lists import read_prompts
from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, request


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield the prompts of all categories, in the order of their numbers."""
    paths = list(path.glob("category_*.csv")) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"{path}: holds no category_*.csv, expected the folder of HEx-PHI")
    named: list[tuple[int, str, Path]] = []
    for file in paths:
        match = re.fullmatch(r"category_([0-9]+)_(.+)\.csv", file.name)
        if match is None:
            raise DataError(f"{file}: unexpected file name, expected category_<number>_<name>.csv")
        named.append((int(match[1]), match[2], file))
    for category_number, category, file in sorted(named):
        for _, number, prompt in read_prompts(file, joins_fields=True):
            name = f"hexphi-{category_number}-{number}"
            yield request(name, prompt, number, origin, category=category)


BENCHMARKS = (
    Benchmark(
        id="hexphi",
        licence="HEx-PHI's own terms (unverified)",
        commercial=None,
        read=read,
        gated=True,
    ),
)
