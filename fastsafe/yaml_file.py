"""Read YAML files of settings strictly: recipes, and the config files of commands."""

from pathlib import Path
from typing import Any

import yaml

from fastsafe.errors import RecipeError, shown

MAX_BYTES = 1 << 20  # of a file, and of its content once every alias is written out
MAX_DEPTH = 64  # nesting of lists and mappings
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads dates as texts and refuses tags, of which a wrong one fails at random.

    `_check` must pass before a node is constructed.
    """

    # 2024-01-31 is the text that was written
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, _TEXT):
            raise ValueError(f"{_place(event)}: tag {shown(event.tag)} is not supported; drop it")
        return super().compose_node(parent, index)


def read_yaml(path: Path, label: str = "") -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        label: Its name in errors; the path by default.

    Raises:
        RecipeError: It cannot be read, is not YAML or not a mapping, has a key twice or one that
            is no text, has a tag, or is too large once its aliases are written out.
    """
    label = label or str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{label}: the file is over {MAX_BYTES} bytes; shorten it")
        if not path.is_file():
            raise RecipeError(f"{label}: is no regular file, expected a YAML file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: is not UTF-8 text") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{label}: is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"{label}: holds {held}, expected a mapping of keys")
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML of any type.

    Raises:
        ValueError: A sentence: it is not YAML, has a key twice or one that is no text, has a tag,
            is nested too deeply, or is too large once its aliases are written out.
    """
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {}, 0)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        reason = " ".join(filter(None, (error.context, error.problem)))
        place = f"{_place(error)}: " if error.problem_mark else ""
        raise ValueError(f"{place}{reason:.200}") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    except RecursionError:
        raise ValueError(f"is nested too deeply, expected {MAX_DEPTH} levels") from None


def _check(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of characters of a node once every alias in it is written out.

    Args:
        node: A node of the composed document; aliases are the same node at several places.
        sizes: Size of each node that is checked, by identity; 0 while it is being checked.
        depth: Its nesting.

    Raises:
        ValueError: It is too large or too deep, holds itself, or has a key twice or one that is no
            text.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(
                f"{_place(node)}: an alias stands for something that holds it; drop it"
            )
        return sizes[id(node)]
    if depth > MAX_DEPTH:
        raise ValueError(f"{_place(node)}: is nested too deeply, expected {MAX_DEPTH} levels")
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise ValueError(f"{_place(node)}: a text has half a character (a lone surrogate)")
        size += len(node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, sizes, depth + 1) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_check(part, sizes, depth + 1) for pair in node.value for part in pair)
    if size > MAX_BYTES:
        raise ValueError(f"{_place(node)}: aliases make it over {MAX_BYTES} characters; drop some")
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, value in node.value:
        if key.tag == _MERGE and not _is_plain(value):
            # versions of PyYAML differ in which of two equal keys wins
            raise ValueError(f"{_place(key)}: << takes one mapping that has no << in it")
        if key.tag not in (_TEXT, _MERGE):
            name = shown(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise ValueError(f"{_place(key)}: a key is {name}, expected a text; put it in quotes")
        if key.value in seen:
            raise ValueError(f"{_place(key)}: key {shown(key.value)} is written twice; keep one")
        seen.add(key.value)


def _is_plain(node: yaml.Node) -> bool:
    """Return whether a node is a mapping that merges no other."""
    return isinstance(node, yaml.MappingNode) and all(key.tag != _MERGE for key, _ in node.value)


def _place(at: Any) -> str:
    """Return the place of an event, a node or an error."""
    mark = getattr(at, "problem_mark", None) or at.start_mark
    return f"line {mark.line + 1}"
