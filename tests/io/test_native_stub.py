"""The stub names what the built module has: every class, method, property and parameter."""

import ast
import inspect
import re
from pathlib import Path

import fastsafe
from fastsafe import _native

STUB = ast.parse((Path(fastsafe.__file__).parent / "_native.pyi").read_text())


def public(names: list[str] | dict[str, object]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_module_has_the_names_of_the_stub() -> None:
    stubbed = {node.name for node in STUB.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert stubbed == public(dir(_native))


def test_bases() -> None:
    assert _native.Error.__mro__[1] is ValueError


def test_methods_and_parameters() -> None:
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            same_parameters(node, getattr(_native, node.name))
        if not isinstance(node, ast.ClassDef):
            continue
        built = getattr(_native, node.name)
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        assert public(methods) == public(vars(built))
        for name, method in methods.items():
            if [d.id for d in method.decorator_list if isinstance(d, ast.Name)] == ["property"]:
                assert isinstance(vars(built)[name], property)
            else:
                same_parameters(method, getattr(built, name))


def same_parameters(stub: ast.FunctionDef, built: object) -> None:
    """Names, or their number where the module gives them none, and defaults."""
    wanted = [a.arg for a in stub.args.args]
    line = inspect.getdoc(built).splitlines()[0]  # type: ignore[union-attr]
    found = re.findall(r"[(,] ?(\w+): ", line)
    unnamed = [name for name in found if re.fullmatch(r"arg\d+", name)]
    assert len(found) == len(wanted), line
    assert unnamed or found == wanted, line
    defaults = [ast.literal_eval(d) for d in stub.args.defaults]
    assert [int(d) for d in re.findall(r" = (\d+)", line)] == defaults, line
