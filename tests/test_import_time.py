"""What an import brings with it: asked of fresh processes, by name and not by the clock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastsafe

ROOT = Path(fastsafe.__file__).parent
HEAVY = {"torch", "triton", "transformers", "peft", "scipy", "matplotlib", "tokenizers"}
ABOVE = ("fastsafe.cli", "fastsafe.safety", "fastsafe.audit")
RUNTIME = ("fastsafe.io", "fastsafe.data", "fastsafe.model", "fastsafe.engine", "fastsafe.train")
NOT_ON_A_BARE_IMAGE = ("pydantic", "typer", "rich", "yaml", "minijinja", "scipy", "jinja2")


def loaded_after(code: str, *argv: str) -> set[str]:
    """Top-level modules that a new process has loaded after ``code``."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps([m.split('.')[0] for m in sys.modules]))"
    run = subprocess.run(
        [sys.executable, "-c", code + tail, *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def modules(*packages: str) -> list[str]:
    """Every module of ``packages`` (or single modules), by looking at the files."""
    found = []
    for package in packages:
        home = ROOT.joinpath(*package.split(".")[1:])
        if home.with_suffix(".py").exists():
            found.append(package)
        for path in sorted(home.rglob("*.py")):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_importing_fastsafe_is_light() -> None:
    loaded = loaded_after("import fastsafe; fastsafe.__version__")
    assert loaded & (HEAVY | {"numpy", "pydantic", "typer", "rich", "yaml"}) == set()


@pytest.mark.parametrize("argv", [("--help",), ("audit", "--help"), ("--version",)], ids=" ".join)
def test_help_is_light(argv: tuple[str, ...]) -> None:
    code = (
        "import sys\nsys.argv[0] = 'fastsafe'\nfrom fastsafe.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded_after(code, *argv) & (HEAVY | {"numpy"}) == set()


def test_the_upper_floors_import_torch_lazily() -> None:
    names = modules(*ABOVE)
    assert len(names) > 20
    code = "\n".join(f"import {name}" for name in names)
    assert loaded_after(code) & HEAVY == set()


def test_the_runtime_floors_import_on_a_bare_image() -> None:
    """torch, triton, numpy, tokenizers and safetensors are there; nothing else is."""
    blocked = f"import sys\nfor name in {NOT_ON_A_BARE_IMAGE}: sys.modules[name] = None\n"
    names = modules(*RUNTIME)
    assert len(names) > 20
    loaded_after(blocked + "\n".join(f"import {name}" for name in names))


def test_the_repository_root_is_not_on_the_path() -> None:
    """It holds a folder ``kernels`` that would shadow another package's."""
    assert str(ROOT.parent) not in sys.path
    assert "" not in sys.path
