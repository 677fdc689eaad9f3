"""``fastsafe list``: everything that a recipe can name; ``fastsafe inspect`` of an adapter."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastsafe.cli import app
from fastsafe.cli.catalogue import KINDS
from fastsafe.commands import catalogue
from fastsafe.io import safetensors
from fastsafe.io.weight_folder import weights_sha256


def run(*words: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize("what", catalogue.KINDS)
def test_list(what: str) -> None:
    plain, as_json = run("list", what), run("list", what, "--json")
    entries = json.loads(as_json.stdout)
    assert [line.split()[0] for line in plain.stdout.splitlines()] == [e["id"] for e in entries]
    assert {entry["id"]: entry["about"] for entry in entries} == catalogue.entries(what)
    assert all(entry["about"] for entry in entries), "what it is, not its name alone"
    assert run("list", what.removesuffix("s")).stdout == plain.stdout


def test_the_command_names_the_kinds_that_there_are() -> None:
    assert tuple(catalogue.KINDS) == KINDS, "its help and completion import none of them"
    result = run("list", "gards")
    assert result.exit_code == 2
    assert "did you mean guards?" in result.stderr


def test_lists_name_the_vocabulary() -> None:
    assert {"plain", "code", "translation", "true_false"} <= catalogue.entries("formats").keys()
    assert catalogue.entries("mitigations")["none"] == "no safety rows"
    assert "organism" in catalogue.entries("recipes")
    judges = catalogue.entries("judges")
    assert {"refusal", "harmbench", "llama_guard", "rubric_paper1"} <= judges.keys()
    assert judges["harmbench"].startswith("asks a model: ")
    assert "{kind: harmbench, checkpoint: PATH}" in judges["harmbench"]
    guards = catalogue.entries("guards")
    assert {"keyword", "llama_guard", "safe_unsafe"} <= guards.keys()
    assert "harmbench" not in guards
    mitigations = catalogue.entries("mitigations")
    assert mitigations["plain"].endswith("before training; needs safety data")
    assert "the untouched model runs in each step, too" in mitigations["first_token_kl"]
    assert "needs unaligned, " in mitigations["safe_lora"]
    assert "Llama" in catalogue.entries("models")["LlamaForCausalLM"]


def test_inspect_describes_an_adapter(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{key}A.weight": torch.ones(2, 16), f"{key}B.weight": torch.ones(8, 2)}
    safetensors.write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    facts = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    assert (facts["adapter"], facts["rank"], facts["parameters"]) == ("LoRA", 2, 48)
    assert facts["target_modules"] == ["q_proj"]
    assert facts["sha256"] == weights_sha256(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused = run("inspect", str(tmp_path))
    assert refused.exit_code == 1
    assert "use_dora is True, which is not supported" in refused.stderr
