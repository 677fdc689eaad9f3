"""Every example in a docstring runs and prints what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import fastsafe
import fastsafe_kernels

ROOTS = [Path(package.__path__[0]) for package in (fastsafe, fastsafe_kernels)]
MODULES = sorted(
    ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    for root in ROOTS
    for path in root.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    module = import_module(name)
    tests = doctest.DocTestFinder().find(module)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(optionflags=flags)
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)
