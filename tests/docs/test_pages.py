"""Every command and snippet of docs/ runs, page by page, in order, in an empty folder.

Conventions: a block under a line that holds a name in backticks and a colon is that file; other
``sh`` blocks hold ``fastsafe`` commands and ``export NAME=VALUE``, one per line, other ``python``
blocks run as they are. Blocks of other languages are shown, not run.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from fastsafe.audit.plan import mitigation_variants
from fastsafe.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("data", "engine", "judges", "plugins", "recipes", "shell", "training")


class Block(NamedTuple):
    """One fenced block."""

    name: str  # of the file that it is; "" for none
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    fences = re.finditer(
        r"(?:^`([\w.-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    return [Block(m[1] or "", m[2], m[3]) for m in fences]


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def fastsafe(*words: str) -> str:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, f"{shlex.join(words)}\n{found.output}"
    return found.stdout


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = shlex.split(line, comments=True)
    if program == "export":
        name, _, value = rest[0].partition("=")
        monkeypatch.setenv(name, value)
        return
    assert program == "fastsafe", f"{line}: pages run fastsafe alone"
    fastsafe(*rest)


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files of a page and run the rest of it, here."""
    found = blocks(page(name))
    assert any(block.language == "sh" for block in found)
    for number, block in enumerate(found):
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            for line in block.text.splitlines():
                command(line, monkeypatch)
        elif block.language == "python":
            script = Path(f"block_{number}.py")
            script.write_text(block.text, encoding="utf-8")
            runpy.run_path(str(script))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("data", "plugins")])
def test_the_page_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name, monkeypatch)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="the page runs code in bubblewrap")
def test_the_page_of_data_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("data", monkeypatch)


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, str]]]:
    """The package of the page, put where pip would put it; its entry points."""
    files = {block.name: block.text for block in blocks(page("plugins"))}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    (folder / "shouting.py").write_text(files["shouting.py"], encoding="utf-8")
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    groups: dict[str, dict[str, str]] = project["entry-points"]
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    mitigation_variants.mitigation_stages.cache_clear()
    yield groups
    mitigation_variants.mitigation_stages.cache_clear()
    sys.modules.pop("shouting", None)


def test_the_package_of_the_page_works(
    plugin: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for group, points in plugin.items():
        listed = json.loads(fastsafe("list", group.removeprefix("fastsafe."), "--json"))
        assert set(points) < {part["id"] for part in listed}
    run("plugins", monkeypatch)
    results = json.loads(Path("runs/shout/results.json").read_text(encoding="utf-8"))
    assert {c["mitigation"] for c in results["conditions"]} == {"none", "shouted"}
    assert {(c["judge"], c["format"]) for c in results["cells"]} == {
        (judge, format) for judge in ("refusal", "brevity") for format in ("plain", "shout")
    }
    assert [row["task"] for row in results["utility"] if row["condition"] == "shout+shouted"]
    mixed = next(c for c in results["conditions"] if c["id"] == "shout+shouted")
    assert mixed["safety_rows"] == 1


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_short_and_its_links_lead_somewhere(name: str) -> None:
    text = page(name)
    assert text.count("\n") <= 160
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert [link for link in links if not (DOCS / link).is_file()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in DOCS.glob("*.md") if f"(docs/{p.name})" not in text] == []
