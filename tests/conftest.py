"""Versions in the header, one hypothesis profile, and what the ``gpu`` marker means."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "triton", "numpy", "tokenizers", "safetensors", "transformers", "peft")

if importlib.util.find_spec("hypothesis"):  # a bare GPU image need not have it
    from hypothesis import settings

    # Derandomized: a red run is red again. No deadline: a slow machine is not a bug.
    settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _lines(folder: str) -> str:
    files = (p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".hpp"})
    return f"{folder} {sum(len(p.read_bytes().splitlines()) for p in files)}"


def pytest_report_header() -> list[str]:
    """Print what the result depends on, and how large the thing is."""
    mode = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "not interpreted"
    return [
        f"python {platform.python_version()}, kernels {mode}, " + ", ".join(map(_version, SHOWN)),
        "lines: " + ", ".join(map(_lines, ("fastsafe", "kernels", "csrc", "tests"))),
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none, saying so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
