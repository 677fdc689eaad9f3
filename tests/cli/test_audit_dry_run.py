"""A dry run of an audit names what cannot be trained before anything is trained."""

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner, Result

import fastsafe
from fastsafe.cli import app

RECIPE = """
name: small
tasks: [plain]
training: {rows: 8, max_steps: 1}
formats: [plain]
behaviours: 2
utility_rows: 1
"""
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def dry_run(folder: Path, template: str | None) -> Result:
    model = folder / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    if template is not None:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (folder / "small.yaml").write_text(RECIPE)
    words = ["audit", str(folder / "small.yaml"), "--model", str(model), "--dry-run", "--json"]
    return CliRunner().invoke(app, words)


def test_every_training_row_is_encoded(tmp_path: Path) -> None:
    train = json.loads(dry_run(tmp_path, None).stdout)["train"]
    assert train["rows"] == 8
    assert train["tokens_trained"] > 8
    assert train["tokens_unknown"] > 0  # English rows, and a vocabulary of 437 words


def test_a_prompt_that_opens_a_thought_can_be_trained(tmp_path: Path) -> None:
    result = dry_run(tmp_path, THOUGHT)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["train"]["rows"] == 8


def test_a_template_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    result = dry_run(tmp_path, "{% if add_generation_prompt %}?{% endif %}" + THOUGHT)
    assert result.exit_code == 1
    assert "plain+none: row 0: the chat template of" in result.stderr
