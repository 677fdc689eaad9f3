"""Training set-ups of published work, each value with the evidence for it.

A preset is a JSON file beside this one: the work, the source of the values, the values, and what is
not replicated of the original.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from fastsafe.errors import UsageError


@dataclass(frozen=True)
class PresetItem:
    """One value of a preset.

    Attributes:
        key: Option of ``fastsafe train`` with underscores; of what is not replicated, any name.
        value: As JSON has it.
        evidence: "verified" in a released artefact, "inferred" from one, or "unverified".
        note: Further remark.
    """

    key: str
    value: Any
    evidence: Literal["verified", "inferred", "unverified"]
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A published training set-up.

    Attributes:
        name: As ``--preset`` takes it.
        about: The work.
        source: Source of the values.
        items: Values that are replicated.
        not_replicated: Parts of the original that are not, with the reasons.
    """

    name: str
    about: str
    source: str
    items: tuple[PresetItem, ...]
    not_replicated: tuple[PresetItem, ...]

    def lines(self) -> Iterator[str]:
        """Yield the preset as text, every value with its evidence."""
        yield f"preset {self.name}: {self.about}"
        yield f"  source: {self.source}"
        for title, items in (("", self.items), ("not replicated:", self.not_replicated)):
            if title:
                yield f"  {title}"
            for item in items:
                note = f"; {item.note}" if item.note else ""
                value = json.dumps(item.value, ensure_ascii=False).replace('"', "")
                yield f"    {item.key} = {value}  ({item.evidence}{note})"


def presets() -> dict[str, Preset]:
    """Return every preset by name."""
    paths = sorted(files(__package__).iterdir(), key=lambda path: path.name)
    named = {path.name[:-5]: path for path in paths if path.name.endswith(".json")}
    return {name: _parse(name, path.read_text("utf-8")) for name, path in named.items()}


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UsageError: No preset has this name.
    """
    by_name = presets()
    if name not in by_name:
        raise UsageError(f"--preset: {name!r} does not exist, expected {' or '.join(by_name)}")
    return by_name[name]


def _parse(name: str, text: str) -> Preset:
    raw = json.loads(text)
    for key in ("items", "not_replicated"):
        raw[key] = tuple(PresetItem(**item) for item in raw[key])
    return Preset(name=name, **raw)
