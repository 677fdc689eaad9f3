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

MAX_RECIPE_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys; YAML would silently keep the last one."""

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


def names() -> tuple[str, ...]:
    """Return the recipes that ship with fastsafe, usable by name."""
    recipes = (files("fastsafe") / "recipes").iterdir()
    return tuple(sorted(f.name[:-5] for f in recipes if f.name.endswith(".yaml")))


def load(
    recipe: str | Path, *, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe by name or path and check it against the schema.

    Names of tasks, formats, mitigations and judges are checked later, by ``plan.checks``.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: ``a.b=c`` strings, the values read as YAML; later ones win.
        changes: Top-level fields to set after the overrides; a None value leaves the field alone.

    Raises:
        RecipeError: The recipe does not exist, is not YAML, or has an unknown key, a wrong type or
            an impossible value.
    """
    location, text = _read(recipe)
    return _checked(location, _parse(location, text), overrides, changes)


def revise(
    recipe: Recipe, *, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Return a copy of a recipe with other settings, checked against the schema.

    Raises:
        RecipeError: As for ``load``.
    """
    return _checked(f"recipe {recipe.name}", recipe.model_dump(), overrides, changes)


def _checked(
    location: str, raw: dict[str, Any], overrides: Iterable[str], changes: Mapping[str, Any] | None
) -> Recipe:
    for override in overrides:
        _override(raw, override)
    raw |= {key: value for key, value in (changes or {}).items() if value is not None}
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_sentence(location, error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, strictly.

    Raises:
        RecipeError: It cannot be read, is not YAML, or has a key twice.
    """
    return _parse(str(path), _read(path.absolute())[1])


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


def _read(recipe: str | Path) -> tuple[str, str]:
    path = Path(recipe)
    name = str(recipe)
    if name in names():
        shipped = files("fastsafe") / "recipes" / f"{name}.yaml"
        return f"recipe {name}", shipped.read_text(encoding="utf-8")
    if not (path.suffix in (".yaml", ".yml") or "/" in name or path.is_file()):
        raise RecipeError(
            f"recipe: {name!r} is neither a shipped recipe nor a YAML file; "
            f"{nearest(name, names())}"
        )
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"recipe {path}: the file is over {MAX_RECIPE_BYTES} bytes")
        return f"recipe {path}", path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: is not UTF-8 text") from error


def _parse(location: str, text: str) -> dict[str, Any]:
    loader = _StrictLoader(text)
    try:
        raw = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{location}: is not valid YAML: {_one_line(error)}") from error
    finally:
        loader.dispose()
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"{location}: holds {held}, expected a mapping of keys")
    return raw


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
    *parents, last = detail["loc"] or (whole.__name__.lower(),)
    path = ".".join(map(str, (*parents, last)))
    if detail["type"] == "extra_forbidden":
        section = ".".join(map(str, parents)) or f"the {whole.__name__.lower()}"
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
