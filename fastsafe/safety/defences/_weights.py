"""The record that every defence that edits weights leaves in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._spec import Defence

RECORD = "defence.json"


def notes(defence: Defence, params: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the file that says what was done: the defence, its parameters, what it changed."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in params.items()}
    found = {"defence": defence.id, "params": given, **record}
    return {RECORD: json.dumps(found, indent=2, sort_keys=True) + "\n"}
