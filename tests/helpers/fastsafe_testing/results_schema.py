"""Generate ``results.schema.json`` and the tables of docs/results.md from the schema's docstrings.

PYTHONPATH=tests/helpers python -m fastsafe_testing.results_schema docs/results.md
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import is_typeddict

from fastsafe.audit.results.schema import instruments, rates, run

NAME = "results.schema.json"
_KINDS = {**vars(rates), **vars(instruments), **vars(run)}
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``results.json``."""
    schema = TypeAdapter(run.Results).json_schema(schema_generator=_Untitled)
    about, meanings = _described(run.Results)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_with_meanings(schema, about, meanings),
        "$defs": {
            name: _with_meanings(part, *_described(_KINDS[name]))
            for name, part in schema["$defs"].items()
        },
    }


def markdown() -> str:
    """Return one table of keys per kind of row."""
    return "\n\n".join(_tables(json_schema())) + "\n"


def write(page: Path) -> None:
    """Write the JSON Schema into the package, and the tables between the marks of ``page``."""
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    Path(str(files("fastsafe.audit.results") / NAME)).write_text(text, encoding="utf-8")
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n{markdown()}\n{END}{tail}", encoding="utf-8")


class _Untitled(GenerateJsonSchema):
    """Leaves out the titles of keys, which repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _described(kind: Any) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a kind's docstring, and the meanings of its keys."""
    meanings: dict[str, str] = {}
    for base in getattr(kind, "__orig_bases__", ()):
        if is_typeddict(base):
            meanings |= _described(base)[1]
    about, _, attributes = inspect.cleandoc(kind.__doc__).partition("\n\nAttributes:\n")
    for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE):
        meanings[name] = " ".join(text.split())
    return about, meanings


def _with_meanings(
    schema: Mapping[str, Any], about: str, meanings: Mapping[str, str]
) -> dict[str, Any]:
    properties = {
        key: {"description": meanings[key], **rest} for key, rest in schema["properties"].items()
    }
    return {**schema, "description": about, "properties": properties}


def _tables(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the whole file, then one per kind of row in the order of first mention."""
    pending = [("results.json", schema)]
    seen = set()
    for heading, part in pending:
        lines = [f"### `{heading}`", "", part["description"], "", "| key | type | meaning |"]
        lines.append("|---|---|---|")
        for key, value in part["properties"].items():
            name = f"`{key}`" if key in part["required"] else f"`{key}`, optional"
            meaning = value["description"].replace("|", "\\|")
            lines.append(f"| {name} | {_type(value)} | {meaning} |")
            for kind in re.findall(r"'#/\$defs/(\w+)'", str(value)):
                if kind not in seen:
                    seen.add(kind)
                    path = key if part is schema else f"{heading}.{key}"
                    pending.append((path, schema["$defs"][kind]))
        yield "\n".join(lines)


def _type(value: Mapping[str, Any]) -> str:
    """Return the type and range of a key in words."""
    if "anyOf" in value:
        return " or ".join(map(_type, value["anyOf"]))
    if "$ref" in value:
        return "object"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if value["type"] == "array":
        return f"list of {_type(value['items'])}s"
    if value["type"] == "object":
        return f"object (values: {_type(value['additionalProperties'])})"
    low, high = value.get("minimum"), value.get("maximum")
    bounds = f" in [{low}, {high}]" if None not in (low, high) else ""
    bounds = bounds or (f" >= {low}" if low is not None else f" <= {high}" if high else "")
    return f"{value['type']}{bounds}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
