"""The border to the engine: what a checkpoint's identity is made of, before anything is loaded."""

import shutil
from pathlib import Path

import pytest

import fastsafe
from fastsafe.audit.runtime import ModelRuntime


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_what_decodes_and_ends_answers_is_part_of_the_identity(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    (model / "notes.txt").write_text("no part of it")
    before = ModelRuntime(str(model)).engine
    assert before == ModelRuntime("organism").engine
    if name.endswith(".jinja"):
        (model / name).write_text("{{ messages[0].content }}")
    else:
        (model / name).write_text((model / name).read_text() + "\n")
    after = ModelRuntime(str(model)).engine
    assert {key for key in after if after[key] != before[key]} == {"tokenizer_sha256"}
