"""Read recipes from files, apply overrides, and check them against the schema."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastsafe.audit.recipe.paths import beside
from fastsafe.audit.recipe.schema import Recipe, RewriterSettings
from fastsafe.errors import RecipeError, nearest, shown
from fastsafe.safety.completers.settings import expected
from fastsafe.yaml_file import parse_yaml, read_yaml


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
        recipe: Name of a shipped recipe, path of a YAML file, to whose folder its paths are
            relative, or a ``Recipe``, which is copied.
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
        raise RecipeError(_sentence(location, error, raw)) from None


def read_rewriter(text: str) -> RewriterSettings:
    """Return the model that a text names: a checkpoint, or a YAML file with a recipe's section.

    Raises:
        RecipeError: The file cannot be read, or holds another section.
    """
    if not text.endswith((".yaml", ".yml")):
        return RewriterSettings(checkpoint=text)
    path = Path(text)
    raw = beside(path.parent, {"rewrite": read_yaml(path)})["rewrite"]
    try:
        return RewriterSettings.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_sentence(text, error, raw, RewriterSettings)) from None


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
            f"recipe: {shown(name)} is neither a shipped recipe nor a YAML file; "
            f"{nearest(name, names())}"
        )
    return f"recipe {path}", beside(path.parent, read_yaml(path, f"recipe {path}"))


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
        raise RecipeError(f"--set: {shown(override)} is not of the form a.b=value")
    for key in keys[:-1]:
        inner = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set: {path} goes into {key!r}, which is not a section")
        raw = inner
    try:
        raw[keys[-1]] = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(
            f"--set: {path} has a value that is not YAML: {shown(value)}: {error}"
        ) from None


def _sentence(
    location: str, error: ValidationError, raw: Any, section: type[BaseModel] = Recipe
) -> str:
    """Return one sentence about the first error; ``raw`` is the mapping that has it."""
    # a list is also "too short" where its items are wrong
    found = error.errors(include_url=False)
    details = [d for d in found if d["type"] != "too_short" or not d["input"]]
    # a misspelt key often leaves another one missing: the misspelling explains both; a mapping
    # where a text was possible, too, is meant as a mapping
    details.sort(
        key=lambda detail: (
            detail["type"] != "extra_forbidden",
            detail["type"] == "string_type" and isinstance(detail["input"], Mapping),
        )
    )
    path = _path(details[0], raw)
    same = [detail for detail in details if _path(detail, raw) == path]
    others = len({_path(detail, raw) for detail in details}) - 1
    more = f" (and {others} more)" if others else ""
    return f"{location}: {_detail(same, path, section)}{more}"


def _path(detail: ErrorDetails, raw: Any) -> tuple[int | str, ...]:
    """Return the keys of an error that the mapping has, or lacks: pydantic adds names of types."""
    path = []
    for key in detail["loc"]:
        is_index = isinstance(raw, list | tuple) and isinstance(key, int)
        if is_index or (isinstance(raw, Mapping) and key in raw):
            path.append(key)
            raw = raw[key]
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _detail(
    details: list[ErrorDetails], path: tuple[int | str, ...], whole: type[BaseModel]
) -> str:
    """Return the words on errors at one place: more than one where no type of several fits."""
    detail = details[0]
    name = whole.__name__.removesuffix("Settings").lower()
    *parents, last = path or (name,)
    if detail["type"] == "extra_forbidden":
        section = ".".join(map(str, parents)) or f"the {name}"
        fields = _fields(whole, parents)
        return f"{shown(last)} is not a key of {section}; {nearest(str(last), fields)}"
    where = ".".join(map(str, path))
    if detail["type"] == "missing":
        return f"{where} is missing, expected a value"
    if detail["type"] == "too_short":
        return f"{where} is empty, expected at least {detail['ctx']['min_length']}"
    first, *rest = dict.fromkeys(map(expected, details))
    words = " or ".join([first, *(other.removeprefix("expected ") for other in rest)])
    # a rule about several keys names them itself
    return f"{where} is {shown(detail['input'])}, {words}" if path else words


def _fields(section: type[BaseModel], parents: Iterable[int | str]) -> tuple[str, ...]:
    for name in parents:
        annotation = section.model_fields[str(name)].annotation
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                section = inner
    return tuple(section.model_fields)
