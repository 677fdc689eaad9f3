"""The terminal gets nothing raw from a recipe, and a sentence where nothing can be printed."""

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fastsafe.cli import app


def test_names_from_a_recipe_reach_no_terminal_raw(tmp_path: Path) -> None:
    recipe = tmp_path / "hostile.yaml"
    recipe.write_text(
        "name: s\ntasks: [code]\nformats: [plain]\nbehaviours: 2\nutility_rows: 1\n"
        "training: {rows: 16, max_steps: 1}\n"
        r'judges: [{kind: rubric_paper1, id: "\e[31mX\e]8;;http://evil\a\u202e", '
        'endpoint: {url: "http://127.0.0.1:9", model: m}}]'
    )
    done = CliRunner().invoke(app, ["audit", str(recipe), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert r"\x1b[31mX" in done.output
    assert not set(done.output) & set("\x1b\x07\u202e")


def test_help_that_cannot_be_printed_is_one_sentence() -> None:
    code = "from fastsafe.cli import main; import sys; sys.argv[1:] = ['--help']; main()"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: output: No space left on device; free space there and run the same command again\n"
    )
