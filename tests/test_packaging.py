"""The sdist builds the wheel, the wheel holds everything that a run needs, and what installs,
builds and publishes it (extras, Makefile, workflows, Dockerfile, citation) is in order."""

import fnmatch
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
PARTS += ("SECURITY.md", "Makefile", "csrc", "fastsafe", "kernels")
NEEDED = ("build", "setuptools", "pybind11")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, from a copy: the checkout stays as it is."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)} to build")
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
    wanted = (
        own(
            ".py",
            ".pyi",
            ".yaml",
            ".json",
            ".jsonl",
            ".txt",
            ".md",
            ".sql",
            ".html",
            ".css",
            "py.typed",
        )
        | checkpoint
    )
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


def test_extras_bring_what_users_want() -> None:
    """Triton comes with CUDA builds of torch; linters come with ``dev`` alone."""
    extras = PROJECT["optional-dependencies"]
    assert not [name for name in PROJECT["dependencies"] if name.startswith("triton")]
    assert extras["gpu"][0].startswith("triton")
    (everything,) = extras["all"]
    assert "dev" not in re.split(r"\W+", everything)
    assert any("gpu" in re.split(r"\W+", line) for line in extras["dev"])


def test_there_is_one_version() -> None:
    import fastsafe

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == fastsafe.__version__ == citation["version"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    cited = {reference["url"].rsplit("/")[-1] for reference in citation["references"]}
    assert cited == {"2409.15361", "2406.10288"}


def make(folder: Path, *words: str) -> str:
    """Standard output of what make would run, in an empty checkout with this Makefile."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    run = subprocess.run(
        ["make", "--dry-run", *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_the_torch_that_it_is_told(tmp_path: Path) -> None:
    """Without ``TORCH`` a machine without a GPU asks the index of CPU builds first."""
    assert 'if test "file" != file' in make(tmp_path, "audit")
    chosen = make(tmp_path, "audit", "TORCH=torch==2.12.0")
    assert 'if test "command line" != file' in chosen
    assert "torch==2.13.0" not in chosen
    assert "triton" not in make(tmp_path, "audit")
    assert "triton" in make(tmp_path, "test")


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_hold_few_rights(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    uses = re.findall(r"^ *-? *uses: *(.*)$", text, re.MULTILINE)
    assert len(uses) == len([step for step in steps(workflow) if "uses" in step])
    pinned = re.compile(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40} +# v\d+(\.\d+)*")
    assert [line for line in uses if not pinned.fullmatch(line)] == []
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert workflow["permissions"] == {"contents": "read"}
    rights = {
        name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
    }
    assert rights in ({}, {"publish": {"id-token": "write"}})


def test_a_hash_stands_for_one_version() -> None:
    pins = set()
    for path in WORKFLOWS:
        pins |= set(re.findall(r"uses: (\S+)@(\w{40}) +# (\S+)", path.read_text(encoding="utf-8")))
    assert len(pins) == len({name for name, *_ in pins})


def stages(dockerfile: str) -> dict[str, list[str]]:
    """Instructions of a Dockerfile by stage, continued lines joined."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", dockerfile).splitlines():
        if line.startswith("FROM "):
            lines = found.setdefault(line.rpartition(" AS ")[2], [])
        if line and not line.startswith("#"):
            lines.append(line)
    return found


def test_images_are_built_from_files_that_are_there() -> None:
    built = stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    for target in ("cpu", "cuda"):
        assert built[target][0] == f"FROM base AS {target}"
        assert {"USER fastsafe", 'ENTRYPOINT ["fastsafe"]'} <= set(built[target])
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    for line in (line for lines in built.values() for line in lines):
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), line
                assert [pattern for pattern in allowed if fnmatch.fnmatch(name, pattern)], line
