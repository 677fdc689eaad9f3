"""What defences write is read by PEFT and transformers, and means there what the formula says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsafe.safety.defences import apply_posthoc, defences

peft = pytest.importorskip("peft")

ALL = defences()
FAMILIES = ["llama3", "qwen2", "gemma2", "phi3"]  # tied, biases, narrow keys, fused on disk
IDS = torch.tensor([list(range(3, 30))])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def write(reference: Any, path: Path, seed: int, rank: int) -> Any:
    """Write a random adapter with PEFT and return PEFT's model with it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(reference), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    return model.eval()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Dense update of every module of a PEFT model."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_an_edited_adapter(
    build: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    base, before = build(family), build(family, seed=1)
    tuned = deltas(write(base.reference, tmp_path / "tuned", 0, 3))
    safe = deltas(write(base.reference, tmp_path / "safe", 1, 4))
    needs = {"unaligned": before.path, "safe_adapter": tmp_path / "safe"}
    wanted: dict[str, Callable[[str], torch.Tensor]] = {
        "wise_ft": lambda module: 0.3 * tuned[module],
        "safe_lora": lambda module: projected(module),
        "safe_merge": lambda module: 0.8 * tuned[module] + 0.2 * safe[module],
    }

    def projected(module: str) -> torch.Tensor:
        V = base.reference.get_submodule(module).weight.double()
        V = V - before.reference.get_submodule(module).weight.double()
        return (V @ V.T / torch.linalg.norm(V) @ tuned[module].double()).float().detach()

    params: dict[str, Any] = {
        "wise_ft": {"strength": 0.3},
        "safe_lora": {"number": 99},
        "safe_merge": {"threshold": 1.0},
    }
    for name, want in wanted.items():
        given = {k: v for k, v in needs.items() if k in ALL[name].needs} | params[name]
        out = apply_posthoc(ALL[name], tmp_path / "tuned", base.path, tmp_path / name, **given)
        found = deltas(peft.PeftModel.from_pretrained(copy.deepcopy(base.reference), out))
        assert found.keys() == tuned.keys()
        for module, delta in found.items():
            assert relative_error(delta, want(module)) < 1e-5, (name, module)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_restored_checkpoint(
    build: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    base, before = build(family), build(family, seed=1)
    tuned = write(base.reference, tmp_path / "tuned", 0, 3)
    out = apply_posthoc(
        ALL["resta"],
        tmp_path / "tuned",
        base.path,
        tmp_path / "out",
        unaligned=before.path,
        gamma=0.1,
    )
    want = copy.deepcopy(base.reference)
    unsafe = before.reference.state_dict()
    for name, weight in want.named_parameters():
        weight += 0.1 * (weight - unsafe[name])
    for module, delta in deltas(tuned).items():
        want.get_submodule(module).weight += delta
    found = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert relative_error(found(IDS).logits, want(IDS).logits) < 1e-4
    assert relative_error(found(IDS).logits, base.reference(IDS).logits) > 1e-2
