"""Adapters written by PEFT give PEFT's logits here, and ours give ours there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import Adapter, AdapterBank

peft = pytest.importorskip("peft")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "seven": {"r": 4, "lora_alpha": 16, "target_modules": SEVEN},
    "two": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 8, "target_modules": SEVEN, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": SEVEN,
        "rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"v_proj": 9, r"layers\.[02]\.self_attn\.o_proj": 1},
    },
    "regex": {"r": 4, "lora_alpha": 4, "target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"},
    "layers": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "gate_proj"],
        "layers_to_transform": [1],
    },
    "excluded": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "exclude_modules": ["up_proj"],
    },
}


def write(reference: Any, path: Path, seed: int = 0, **config: Any) -> Any:
    """Write a random adapter with PEFT and return PEFT's model with it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.eval()
    model.save_pretrained(path)
    return model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def logits(model: Any, ids: list[int], project: Any = None) -> torch.Tensor:
    tokens = torch.tensor(ids)
    hidden = model.forward(tokens, torch.arange(len(ids)), PackedAttention([len(ids)]), project)
    return model.logits(hidden)


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_adapter_gives_pefts_logits(
    build: Callable[..., Any], tmp_path: Path, family: str, kind: str
) -> None:
    pair = build(family)
    theirs = write(pair.reference, tmp_path / kind, **CONFIGS[kind])
    bank = AdapterBank(pair.model)
    slot = bank.load(tmp_path / kind)
    ids = list(range(3, 40))
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0]
    base = logits(pair.model, ids)
    assert relative_error(base, want) > 1e-2, "the adapter must matter"
    for project in (bank.merged(slot), bank.mixed(torch.full((len(ids),), slot))):
        assert relative_error(logits(pair.model, ids, project), want) < 1e-5


@pytest.mark.parametrize("family", ["phi3", "qwen3", "olmo2"])
def test_fused_and_normed_families(build: Callable[..., Any], tmp_path: Path, family: str) -> None:
    pair = build(family)
    write(pair.reference, tmp_path / "a", r=4, lora_alpha=8, target_modules="all-linear")
    bank = AdapterBank(pair.model)
    slot = bank.load(tmp_path / "a")
    ids = list(range(3, 20))
    with torch.no_grad():
        want = pair.reference(torch.tensor([ids])).logits[0]
    assert relative_error(logits(pair.model, ids, bank.merged(slot)), want) < 1e-5


def test_mixed_batch_equals_pefts_mixed_batch(build: Callable[..., Any], tmp_path: Path) -> None:
    pair = build("llama2")
    torch.manual_seed(0)
    kinds = ["seven", "two", "patterns"]
    theirs = None
    for i, kind in enumerate(kinds):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[kind])
        if theirs is None:
            theirs = peft.get_peft_model(pair.reference, config, adapter_name=kind)
        else:
            theirs.add_adapter(kind, config)
        for name, weight in theirs.named_parameters():
            if f".{kind}." in name:
                torch.nn.init.normal_(weight, std=0.05 * (i + 1))
    assert theirs is not None
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    bank = AdapterBank(pair.model)
    slots = {kind: bank.load(tmp_path / kind) for kind in kinds}
    names = ["seven", "__base__", "patterns", "two", "seven", "two"]
    rows = torch.randint(0, 128, (6, 11))
    with torch.no_grad():
        want = theirs(rows, adapter_names=names).logits
        owner = torch.tensor([slots.get(name, -1) for name in names]).repeat_interleave(11)
        hidden = pair.model.forward(
            rows.flatten(), torch.arange(11).repeat(6), PackedAttention([11] * 6), bank.mixed(owner)
        )
        got = pair.model.logits(hidden).view(want.shape)
    assert relative_error(got, want) < 1e-5


def test_kept_rows_of_a_mixed_batch(build: Callable[..., Any], tmp_path: Path) -> None:
    pair = build("llama2")
    bank = AdapterBank(pair.model)
    write(pair.reference, tmp_path / "a", **CONFIGS["seven"])
    slot = bank.load(tmp_path / "a")
    tokens, positions = torch.arange(24), torch.arange(8).repeat(3)
    owner = torch.tensor([slot, -1, slot]).repeat_interleave(8)
    keep = torch.tensor([2, 9, 23, 4])
    args = (tokens, positions, PackedAttention([8, 8, 8]), bank.mixed(owner))
    with torch.no_grad():
        whole, part = pair.model.forward(*args), pair.model.forward(*args, keep)
    assert relative_error(part, whole[keep]) < 1e-6


def test_our_adapter_loads_in_peft(build: Callable[..., Any], tmp_path: Path) -> None:
    pair = build("llama2")
    write(pair.reference, tmp_path / "theirs", **CONFIGS["patterns"])
    ids = list(range(5, 30))
    with torch.no_grad():
        want = pair.reference(torch.tensor([ids])).logits[0]
    adapter = Adapter.load(tmp_path / "theirs", pair.model.slots(), "a")
    adapter.save(tmp_path / "ours")
    fresh = build("llama2")
    ours = peft.PeftModel.from_pretrained(fresh.reference, tmp_path / "ours").eval()
    with torch.no_grad():
        got = ours(torch.tensor([ids])).logits[0]
    assert torch.equal(got, want)
