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
        assert isinstance(node, ast.ClassDef)
        built = getattr(_native, node.name)
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        assert public(methods) == public(vars(built))
        for name, method in methods.items():
            if method.decorator_list:
                assert isinstance(vars(built)[name], property)
                continue
            arguments = method.args
            defaults = [ast.literal_eval(d) for d in arguments.defaults]
            wanted = [a.arg for a in arguments.args]
            line = inspect.getdoc(getattr(built, name)).splitlines()[0]  # type: ignore[union-attr]
            found = re.findall(r"[(,] ?(\w+): ", line)
            assert found == wanted, line
            assert [int(d) for d in re.findall(r" = (\d+)", line)] == defaults, line
