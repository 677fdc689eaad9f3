"""The record that every defence that edits weights leaves in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._spec import Defence

RECORD = "defence.json"


def notes(defence: Defence, params: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Return ``defence.json``: the defence, its parameters and the modules that it changed."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in params.items()}
    content = {"defence": defence.id, "params": values, **record}
    return {RECORD: json.dumps(content, indent=2, sort_keys=True) + "\n"}
