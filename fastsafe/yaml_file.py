"""Read YAML files of settings strictly: recipes, and the config files of commands."""

from pathlib import Path
from typing import Any

import yaml

from fastsafe.errors import RecipeError

MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, label: str = "") -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        label: Its name in errors; the path by default.

    Raises:
        RecipeError: It cannot be read, is not YAML or not a mapping, or has a key twice.
    """
    label = label or str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{label}: the file is over {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: is not UTF-8 text") from error
    try:
        content = _StrictLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{label}: is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"{label}: holds {held}, expected a mapping of keys")
    return content
