"""The Python of README and docs passes a strict type checker, as that of a user would have to."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_of_the_pages_passes_mypy(tmp_path: Path) -> None:
    scripts = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        # a block under the name of a file is not run by itself, but typed all the same
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 2
            script = tmp_path / f"{page.stem.lower()}_line_{line}.py"
            script.write_text(match[1], encoding="utf-8")
            scripts.append(script.name)
    assert len(scripts) > 4
    # torch and the like are taken as untyped, which makes this quick
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--config-file="]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path / "cache"), *scripts],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"checked \d+ source files|no issues found", done.stdout), done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(tuple(scripts))] == []
