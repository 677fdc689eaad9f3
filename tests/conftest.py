"""Versions in the header, one hypothesis profile, and what the ``gpu`` marker means."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import pytest

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


def pytest_report_header() -> str:
    """Print what the result depends on."""
    mode = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "not interpreted"
    return f"python {platform.python_version()}, kernels {mode}, " + ", ".join(map(_version, SHOWN))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none, saying so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
