"""The import graph: no module imports itself in a circle, and a command reaches few modules.

Imports inside functions count as much as those at the top; `if TYPE_CHECKING` does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Maximum number of modules of fastsafe that a command may reach. Raising one is a decision: say why
# in docs/log.md.
REACH = {"fastsafe.cli.verify": 90, "fastsafe.cli.train": 106}

Graph = dict[str, set[str]]


def module_files() -> dict[str, Path]:
    """Every module of fastsafe and fastsafe_kernels by its dotted name."""
    files = {}
    for top in (ROOT / "fastsafe", ROOT / "kernels" / "fastsafe_kernels"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top.parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement that may run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def lazy_names(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Names that a package imports on first use -> the modules they are from.

    Such a package imports them under `if TYPE_CHECKING` and has a ``__getattr__``.
    """
    found = {}
    for module, tree in trees.items():
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for block in filter(is_type_checking, tree.body if "__getattr__" in functions else ()):
            for node in ast.walk(block):
                if isinstance(node, ast.ImportFrom):
                    found |= {f"{module}.{a.name}": f"{node.module}.{a.name}" for a in node.names}
    return found


def targets(module: str, is_package: bool, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names that an import statement names, each maybe a module or a name in one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *([base] if base else [])])
    yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph() -> Graph:
    """Module -> the modules that it imports, those inside its functions included."""
    files = module_files()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    lazy = lazy_names(trees)
    graph: Graph = {}
    for module, tree in trees.items():
        graph[module] = set()
        for node in imports(tree):
            for target in targets(module, files[module].name == "__init__.py", node):
                name = target
                while name in lazy:
                    name = lazy[name]
                while name and name not in files:
                    name = name.rpartition(".")[0]
                graph[module] |= {name} - {"", module}
    return graph


def packages_of(module: str) -> set[str]:
    """Packages that Python imports before the module."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def reach(graph: Graph, start: str) -> set[str]:
    """Modules that are imported sooner or later once ``start`` is.

    The packages around ``start`` are left out: ``fastsafe.cli`` imports every command.
    """
    seen = {start}
    queue = [start]
    while queue:
        for name in graph[queue.pop()]:
            for module in {name, *packages_of(name)} - seen - packages_of(start):
                seen.add(module)
                queue.append(module)
    return seen


def cycle(graph: Graph) -> list[str]:
    """A circle of imports as a path, empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for name in sorted(graph[module]):
            if circle := visit(name):
                return circle
        done.add(path.pop())
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    assert " -> ".join(cycle(import_graph())) == ""


@pytest.mark.parametrize(("command", "most"), REACH.items())
def test_a_command_reaches_few_modules(command: str, most: int) -> None:
    graph = import_graph()
    modules = {name for name in reach(graph, command) if name.startswith("fastsafe.")}
    assert {name for name in modules if name.startswith("fastsafe.audit")} == set()
    assert len(modules) <= most, sorted(modules)


def test_a_circle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_seen() -> None:
    source = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import never
else:
    import other
def f():
    from . import sibling
    from ..up import x
"""
    nodes = list(imports(ast.parse(source)))
    names = [name for node in nodes for name in targets("p.q.r", False, node)]
    assert names == ["a.b", "typing.TYPE_CHECKING", "other", "p.q.sibling", "p.up.x"]
    assert list(targets("p.q", True, nodes[-2])) == ["p.q.sibling"]
