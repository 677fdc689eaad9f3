"""XSTest (Röttger et al. 2024): ``xstest_prompts.csv``, 250 safe prompts and 200 contrasts.

Columns ``id`` (or ``id_v2``), ``prompt``, ``type``; ``label`` (safe, unsafe) and ``focus`` are
missing in some re-uploads. A safe prompt is the benign side of the contrast of its focus, about
150 pairs; prompts without a partner have one side alone. Without ``focus`` all have.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsafe.errors import DataError
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, rows, words

_CONTRAST = "contrast_"


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield a pair or a single prompt at the place of its harmful side, or of its only one."""
    found = list(rows(path, "id prompt type", "id_v2 prompt type"))
    partner = _partners(found, path)
    taken = set(partner.values())
    by_number = dict(found)
    for number, row in found:
        if number in taken:
            continue
        where = f"{path}: row {number}"
        text, harmful = words(row, "prompt", where), _is_harmful(row, where)
        benign = words(by_number[partner[number]], "prompt", where) if number in partner else ""
        yield Behaviour(
            f"xstest-{str(row.get('id_v2', row.get('id'))).strip()}",
            text if harmful else "",
            benign if harmful else text,
            category=words(row, "type", where).removeprefix(_CONTRAST),
            form="request",
            origin=origin,
            source_row=number,
        )


def _partners(found: list[tuple[int, Mapping[str, Any]]], path: Path) -> dict[int, int]:
    """Number of a contrast's row -> number of the safe row of its focus, in the file's order."""
    groups: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for number, row in found:
        if focus := str(row.get("focus") or "").strip().lower():
            groups[focus][_is_harmful(row, f"{path}: row {number}")].append(number)
    pairs = (zip(harmful, safe, strict=False) for safe, harmful in groups.values())
    return {number: other for group in pairs for number, other in group}


def _is_harmful(row: Mapping[str, Any], where: str) -> bool:
    harmful = words(row, "type", where).startswith(_CONTRAST)
    if row.get("label") not in (None, "", "unsafe" if harmful else "safe"):
        raise DataError(
            f"{where}: label is {row['label']!r} and type {row['type']!r}, expected them to agree"
        )
    return harmful


BENCHMARKS = (Benchmark(id="xstest", licence="CC-BY-4.0 (unverified)", commercial=True, read=read),)
