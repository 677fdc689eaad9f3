"""fastsafe verify: equal checkpoints are called equal, and each kind of difference is seen."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastsafe
from fastsafe.cli import app
from fastsafe.engine import LLM
from fastsafe.errors import TokenizerError, UsageError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.transformers_backend import verify as module
from fastsafe.transformers_backend.verify import prompts, verify


def test_the_prompts_are_short_and_many() -> None:
    texts = prompts()
    assert len(texts) == len(set(texts)) >= 12
    assert all(0 < len(text) < 200 for text in texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_organism_is_equal(dtype: str) -> None:
    found = verify(fastsafe.organism.path(), dtype=dtype, num_prompts=3)
    assert found.is_equal, found.differences
    assert found.has_template
    assert found.num_prompts == 3
    assert found.error <= found.tolerance < 0.1
    assert found.logits_difference < 2 * found.tolerance


def test_without_a_template_and_with_an_adapter(
    checkpoint: Path, adapters: dict[str, Path]
) -> None:
    found = verify(checkpoint, adapter=adapters["one"], num_prompts=3)
    assert found.is_equal, found.differences
    assert not found.has_template


def test_wrong_logits_are_a_difference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = LLM.logits
    monkeypatch.setattr(LLM, "logits", lambda *args: logits(*args) * 1.001)
    found = verify(checkpoint, num_prompts=2)
    assert not found.is_equal
    assert "logits: the error is 0.001" in found.differences[0]


def test_nan_logits_are_a_difference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = LLM.logits
    monkeypatch.setattr(LLM, "logits", lambda *args: logits(*args) * float("nan"))
    assert not verify(checkpoint, num_prompts=2).is_equal


def test_weights_without_finite_logits_are_said(checkpoint: Path, tmp_path: Path) -> None:
    from fastsafe.io import safetensors

    path = tmp_path / "nan"
    shutil.copytree(checkpoint, path)
    tensors = safetensors.read(path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.write(path / "model.safetensors", tensors)
    found = verify(path, num_prompts=2)
    assert "logits: those of transformers are not finite; look at the weights" in found.differences


def test_wrong_tokens_are_a_difference(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LLM.generate

    def other(self: LLM, rows: Any, params: Any, adapters: Any) -> Any:
        from dataclasses import replace

        first, *rest = generate(self, rows, params, adapters)
        ids = [*first.token_ids[:2], (first.token_ids[2] + 1) % 96, *first.token_ids[3:]]
        return [replace(first, token_ids=tuple(ids)), *rest]

    monkeypatch.setattr(LLM, "generate", other)
    found = verify(checkpoint, num_prompts=2)
    assert found.parted_rows == 1
    assert "prompt 0 parts at token 2" in found.differences[0]


def test_wrong_token_ids_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, encode = Tokenizer.encode_chat, Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode_chat", lambda *args: [5, *chat(*args)])
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: encode(*a, **k) or [5])
    found = verify(fastsafe.organism.path(), num_prompts=2)
    assert found.differences == ("chat template: token ids of prompts [0, 1] differ",)


def test_no_room_for_the_truth_is_one_sentence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda device: 1000)
    with pytest.raises(UsageError, match="weights in float64, used as reference"):
        verify(checkpoint)


def test_a_tokenizer_that_transformers_refuses(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def broken(*args: Any, **options: Any) -> None:
        raise ValueError("no such class\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(TokenizerError, match="refused by transformers"):
        verify(checkpoint, num_prompts=1)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["verify", *words])


def test_the_command_prints_a_verdict() -> None:
    result = run("organism", "--prompts", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["verdict", "equal"]
    found = json.loads(run("organism", "--prompts", "1", "--json").stdout)
    assert found["equal"] is True
    assert found["num_prompts"] == 1


def test_the_command_exits_1_on_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = LLM.logits
    monkeypatch.setattr(LLM, "logits", lambda *args: logits(*args) + 1)
    result = run("organism", "--prompts", "1")
    assert result.exit_code == 1
    assert "different" in result.stdout
    assert result.stderr == "error: organism: differs from transformers\n"


def test_the_command_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("organism")
    assert result.exit_code == 2
    assert "pip install '.[parity]'" in result.stderr
