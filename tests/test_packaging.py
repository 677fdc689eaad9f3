"""The sdist builds the wheel, and the wheel holds everything that a run needs."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
PARTS += ("SECURITY.md", "Makefile", "csrc", "fastsafe", "kernels")
NEEDED = ("build", "setuptools", "pybind11")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} to build")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, from a copy: the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=unwanted)
        else:
            shutil.copy(ROOT / part, source / part)
    out = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return out


def own(*suffixes: str) -> set[str]:
    """Files of both packages with these suffixes, as the wheel names them."""
    roots = (ROOT, ROOT / "kernels")
    packages = (ROOT / "fastsafe", ROOT / "kernels" / "fastsafe_kernels")
    return {
        path.relative_to(root).as_posix()
        for root, package in zip(roots, packages, strict=True)
        for suffix in suffixes
        for path in package.rglob(f"*{suffix}")
    }


def test_the_wheel_holds_code_and_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    checkpoint = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fastsafe/organism/checkpoint").iterdir()
    }
    assert any(name.endswith("/model.safetensors") for name in checkpoint)
    wanted = own(".py", ".pyi", ".yaml", ".json", ".sql", ".html", ".css", "py.typed") | checkpoint
    assert wanted - names == set()
    assert [name for name in names if name.startswith("fastsafe/_native.")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_wheel_owns_two_names(built: Path) -> None:
    """No ``tests`` or ``kernels`` in anybody's site-packages."""
    (wheel,) = built.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fastsafe",
        "fastsafe_kernels",
    }


def test_the_sdist_holds_the_sources(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.[ch]pp")}
    kernels = {f"kernels/{name}" for name in own(".py") if name.startswith("fastsafe_kernels/")}
    assert native | kernels | set(PARTS[:8]) <= names
