"""Recipes as files: read, overridden, and every name in them checked."""

from collections.abc import Collection, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastsafe.audit.plan.mitigation_variants import treatments
from fastsafe.audit.recipe.schema import Recipe, RewriterSettings
from fastsafe.audit.sources.registry import source_of
from fastsafe.errors import RecipeError, nearest

MAX_RECIPE_BYTES = 1 << 20


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


def names() -> tuple[str, ...]:
    """Return the recipes that ship with fastsafe, usable by name."""
    found = (files("fastsafe") / "recipes").iterdir()
    return tuple(sorted(f.name[:-5] for f in found if f.name.endswith(".yaml")))


def load(
    recipe: str | Path, *, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe by name or path and check every key of it.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: ``a.b=c`` strings, the values read as YAML; later ones win.
        changes: Top-level fields to set after the overrides; a None value leaves the field alone.

    Raises:
        RecipeError: The recipe does not exist, is not YAML, has an unknown key, a wrong type, an
            impossible value, or names a task, format, mitigation or judge that does not exist.
    """
    where, text = _read(recipe)
    return _checked(where, _parse(where, text), overrides, changes)


def revise(
    recipe: Recipe, *, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Return a recipe with other settings, checked as ``load`` checks it.

    Raises:
        RecipeError: As for ``load``.
    """
    return _checked(f"recipe {recipe.name}", recipe.model_dump(), overrides, changes)


def _checked(
    where: str, raw: dict[str, Any], overrides: Iterable[str], changes: Mapping[str, Any] | None
) -> Recipe:
    for override in overrides:
        _override(raw, override)
    raw |= {key: value for key, value in (changes or {}).items() if value is not None}
    try:
        checked = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_sentence(where, error)) from None
    _check_names(where, checked)
    return checked


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


def _parse(where: str, text: str) -> dict[str, Any]:
    loader = _StrictLoader(text)
    try:
        raw = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: is not valid YAML: {_one_line(error)}") from error
    finally:
        loader.dispose()
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"{where}: holds {held}, expected a mapping of keys")
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


def _check_names(where: str, recipe: Recipe) -> None:
    """Refuse a name that nothing has."""
    from fastsafe.safety.formats import formats
    from fastsafe.safety.judges import judges
    from fastsafe.safety.mixing.manipulations import manipulations
    from fastsafe.safety.mixing.prompt_styles import STYLES
    from fastsafe.safety.tasks import tasks

    registries: dict[str, Collection[str]] = {
        "tasks": tasks(),
        "manipulations": manipulations(),
        "styles": STYLES,
        "formats": formats(),
        "safety_formats": formats(),
        "judges": judges(),
    }
    for field, known in registries.items():
        for name in getattr(recipe, field) or ():
            if isinstance(name, str) and name not in known:
                raise RecipeError(f"{where}: {field} has {name!r}; {nearest(name, known)}")
    treatments(recipe)
    source_of(recipe)


def _sentence(where: str, error: ValidationError, section: type[BaseModel] = Recipe) -> str:
    """Say what is wrong first, in one sentence."""
    details = error.errors(include_url=False)
    # a misspelt key often leaves another one missing: the misspelling explains both
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {_detail(details[0], section)}{more}"


def _detail(detail: ErrorDetails, whole: type[BaseModel]) -> str:
    name = whole.__name__.removesuffix("Settings").lower()
    *parents, last = detail["loc"] or (name,)
    path = ".".join(map(str, (*parents, last)))
    if detail["type"] == "extra_forbidden":
        section = ".".join(map(str, parents)) or f"the {name}"
        known = _fields(whole, parents)
        return f"{str(last)!r} is not a key of {section}; {nearest(str(last), known)}"
    if detail["type"] == "missing":
        return f"{path} is missing, expected a value"
    if detail["type"] == "too_short":
        return f"{path} is empty, expected at least {detail['ctx']['min_length']}"
    message = detail["msg"].removeprefix("Value error, ")
    said = f"{message[0].lower()}{message[1:]}"
    # a rule about several keys names them itself
    return f"{path} is {_short(detail['input'])}; {said}" if detail["loc"] else said


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
