"""Benchmarks and examples as modules: they are scripts, and in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def load(path: Path) -> ModuleType:
    """Load a script anew, without running it as a program."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def benchmark(name: str) -> ModuleType:
    return load(ROOT / "benchmarks" / f"{name}.py")


def example(name: str) -> ModuleType:
    return load(ROOT / "docs" / "examples" / f"{name}.py")
