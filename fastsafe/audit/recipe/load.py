"""Read recipes from files, apply overrides, and check them against the schema."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastsafe.audit.recipe.schema import Recipe, RewriterSettings
from fastsafe.errors import RecipeError, nearest
from fastsafe.yaml_file import read_yaml


def names() -> tuple[str, ...]:
    """Return the recipes that ship with fastsafe, usable by name."""
    recipes = (files("fastsafe") / "recipes").iterdir()
    return tuple(sorted(f.name[:-5] for f in recipes if f.name.endswith(".yaml")))


def load(
    recipe: str | Path | Recipe,
    *,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe by name or path, or copy a loaded one, and check it against the schema.

    Names of tasks, formats, mitigations and judges are checked later, by ``plan.checks``.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a ``Recipe``, which is copied.
        overrides: ``a.b=c`` strings, the values read as YAML, of which later ones win; or a
            mapping of values, nested or with dotted keys.
        changes: Top-level fields to set after the overrides; a None value leaves the field alone.

    Raises:
        RecipeError: The recipe does not exist, is not YAML, or has an unknown key, a wrong type or
            an impossible value.
    """
    location, raw = _read(recipe)
    if isinstance(overrides, str):
        raise RecipeError(f"overrides is {overrides!r:.60}, expected a mapping or a list of texts")
    if isinstance(overrides, Mapping):
        _merge(raw, overrides)
    else:
        for override in overrides:
            _override(raw, override)
    raw |= {key: value for key, value in (changes or {}).items() if value is not None}
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_sentence(location, error)) from None


def read_rewriter(text: str) -> RewriterSettings:
    """Return the model that a text names: a checkpoint, or a YAML file with a recipe's section.

    Raises:
        RecipeError: The file cannot be read, or holds another section.
    """
    if not text.endswith((".yaml", ".yml")):
        return RewriterSettings(checkpoint=text)
    raw = read_yaml(Path(text))
    try:
        return RewriterSettings.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_sentence(text, error, RewriterSettings)) from None


def _read(recipe: str | Path | Recipe) -> tuple[str, dict[str, Any]]:
    if isinstance(recipe, Recipe):
        return f"recipe {recipe.name}", recipe.model_dump()
    path = Path(recipe)
    name = str(recipe)
    if name in names():
        path = Path(str(files("fastsafe"))) / "recipes" / f"{name}.yaml"
        return f"recipe {name}", read_yaml(path, f"recipe {name}")
    if not (path.suffix in (".yaml", ".yml") or "/" in name or path.is_file()):
        raise RecipeError(
            f"recipe: {name!r} is neither a shipped recipe nor a YAML file; "
            f"{nearest(name, names())}"
        )
    return f"recipe {path}", read_yaml(path, f"recipe {path}")


def _merge(raw: dict[str, Any], values: Mapping[str, Any], parent: str = "") -> None:
    """Set values in a recipe; a mapping goes into the section of its key and keeps the others."""
    for path, value in values.items():
        *parents, last = str(path).split(".")
        section = raw
        for key in parents:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                name = f"{parent}{path}"
                raise RecipeError(f"overrides: {name} goes into {key!r}, which is not a section")
        if isinstance(value, Mapping) and isinstance(section.get(last), dict):
            _merge(section[last], value, f"{parent}{path}.")
        else:
            section[last] = str(value) if isinstance(value, Path) else value


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set: {override!r} is not of the form a.b=value")
    for key in keys[:-1]:
        inner = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set: {path} goes into {key!r}, which is not a section")
        raw = inner
    try:
        raw[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set: {path} has a value that is not YAML: {value!r}") from error


def _sentence(location: str, error: ValidationError, section: type[BaseModel] = Recipe) -> str:
    """Return one sentence about the first error."""
    details = error.errors(include_url=False)
    # a misspelt key often leaves another one missing: the misspelling explains both
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{location}: {_detail(details[0], section)}{more}"


def _detail(detail: ErrorDetails, whole: type[BaseModel]) -> str:
    name = whole.__name__.removesuffix("Settings").lower()
    *parents, last = detail["loc"] or (name,)
    path = ".".join(map(str, (*parents, last)))
    if detail["type"] == "extra_forbidden":
        section = ".".join(map(str, parents)) or f"the {name}"
        fields = _fields(whole, parents)
        return f"{str(last)!r} is not a key of {section}; {nearest(str(last), fields)}"
    if detail["type"] == "missing":
        return f"{path} is missing, expected a value"
    if detail["type"] == "too_short":
        return f"{path} is empty, expected at least {detail['ctx']['min_length']}"
    message = detail["msg"].removeprefix("Value error, ")
    sentence = f"{message[0].lower()}{message[1:]}"
    # a rule about several keys names them itself
    return f"{path} is {_short(detail['input'])}; {sentence}" if detail["loc"] else sentence


def _fields(section: type[BaseModel], parents: Iterable[int | str]) -> tuple[str, ...]:
    for name in parents:
        annotation = section.model_fields[str(name)].annotation
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                section = inner
    return tuple(section.model_fields)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
