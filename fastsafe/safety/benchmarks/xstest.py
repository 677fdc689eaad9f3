"""XSTest (Röttger et al. 2024): ``xstest_prompts.csv``, 250 safe prompts and 200 contrasts.

Columns ``id`` (or ``id_v2``), ``prompt``, ``type``; ``label`` (safe, unsafe) and ``focus`` are
missing in some re-uploads. A safe prompt is the benign side of a contrast with the same focus,
which gives about 150 pairs; other prompts, and all without ``focus``, have one side alone.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsafe.errors import DataError, shown
from fastsafe.safety.behaviours import Behaviour, Origin

from ._spec import Benchmark, rows, words

_CONTRAST = "contrast_"


def read(path: Path, origin: Origin) -> Iterator[Behaviour]:
    """Yield every pair at the row of its harmful side, and every single prompt at its row."""
    found = list(rows(path, "id prompt type", "id_v2 prompt type"))
    partner = _partners(found)
    benign_sides = set(partner.values())
    by_number = {number: (row, location) for location, number, row in found}
    for location, number, row in found:
        if number in benign_sides:
            continue
        text, harmful = words(row, "prompt", location), _is_harmful(row, location)
        benign = ""
        if number in partner:
            twin, twin_location = by_number[partner[number]]
            benign = words(twin, "prompt", twin_location)
        yield Behaviour(
            f"xstest-{str(row.get('id_v2', row.get('id'))).strip()}",
            text if harmful else "",
            benign if harmful else text,
            category=words(row, "type", location).removeprefix(_CONTRAST),
            form="request",
            origin=origin,
            source_row=number,
        )


def _partners(found: list[tuple[str, int, Mapping[str, Any]]]) -> dict[int, int]:
    """Return the row number of the safe prompt by that of the contrast with the same focus."""
    groups: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for location, number, row in found:
        if focus := str(row.get("focus") or "").strip().lower():
            groups[focus][_is_harmful(row, location)].append(number)
    pairs = (zip(harmful, safe, strict=False) for safe, harmful in groups.values())
    return {contrast: safe for group in pairs for contrast, safe in group}


def _is_harmful(row: Mapping[str, Any], location: str) -> bool:
    harmful = words(row, "type", location).startswith(_CONTRAST)
    if row.get("label") not in (None, "", "unsafe" if harmful else "safe"):
        raise DataError(
            f"{location}: label is {shown(row['label'])} and type {shown(row['type'])}, "
            "expected them to agree"
        )
    return harmful


BENCHMARKS = (Benchmark(id="xstest", licence="CC-BY-4.0 (unverified)", commercial=True, read=read),)
