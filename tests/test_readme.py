"""Every command and every snippet of README.md runs, in order, in an empty folder.

Conventions: ``sh`` blocks hold one command per line, ``echo 'text' > FILE`` among them, ``python``
blocks run as they are. Set-up commands are checked for what they name; an audit runs with fewer
rows and steps, a comparison with fewer prompts. Links lead to files that are there.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = {
    "audit": ["--limit", "2", "--set", "training.max_steps=2", "--set", "training.rows=64"],
    "verify": ["--prompts", "2"],
}
ELSEWHERE = {"git", "cd", "source", "."}  # getting the repository and entering it


class Block(NamedTuple):
    """One fenced block."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """Fenced ``sh`` and ``python`` blocks of a Markdown text, with their first line."""
    fences = re.finditer(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in fences]


def commands(block: str) -> list[list[str]]:
    """Commands of an ``sh`` block as words; comments and line continuations are taken out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"", *project["optional-dependencies"]}


def run(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def follow(words: list[str], folder: Path) -> None:
    """Run one command of the README as far as a test can."""
    program, *rest = words
    if program == "make":
        known = targets((ROOT / "Makefile").read_text())
        named = [word for word in rest if "=" not in word]
        assert set(named) <= known, f"{words}: no such target"
        if "audit" in named:
            follow(["fastsafe", "audit", "organism", "--out", "runs/organism"], folder)
    elif program == "fastsafe":
        small = [] if "--dry-run" in rest else SMALL.get(rest[0], [])
        run([str(BIN / "fastsafe"), *rest, *small], folder)
    elif program == "echo":
        text, into, name = rest
        assert into == ">", f"{words}: expected echo TEXT > FILE"
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    elif program == "pip" or words[:3] == ["uv", "pip", "install"]:
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= extras(), f"{words}: no such extra"
    elif program.startswith("benchmarks/"):
        assert os.access(ROOT / program, os.X_OK), f"{program} is not executable"
    else:
        assert program in ELSEWHERE, f"{words}: say in this test how to check {program!r}"


def test_the_readme_runs(tmp_path: Path) -> None:
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(block.language == "sh" for block in found)
    for block in found:
        if block.language == "python":
            script = tmp_path / f"readme_line_{block.line}.py"
            script.write_text(block.text, encoding="utf-8")
            run([sys.executable, str(script)], tmp_path)
            continue
        for words in commands(block.text):
            follow(words, tmp_path)


def test_links_lead_somewhere_and_the_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert text.count("\n") <= 150


def test_blocks_and_commands_are_found() -> None:
    shell = "# why\nmake audit   # five minutes\nfastsafe a \\\n  --b 'c d'\n"
    text = f"# T\n```sh\n{shell}```\n```text\nno\n```\n"
    assert [(b.language, b.line) for b in blocks(text)] == [("sh", 3)]
    assert commands(blocks(text)[0].text) == [["make", "audit"], ["fastsafe", "a", "--b", "c d"]]


@pytest.mark.parametrize(
    "words",
    [
        ["make", "nothing"],
        ["pip", "install", "fastsafe[nothing]"],
        ["rm", "-r", "x"],
        ["echo", "nothing", ">>", "x"],
    ],
)
def test_unknown_commands_are_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"nothing|how to check"):
        follow(words, tmp_path)
