"""Training equals PEFT with torch's AdamW on the same batches.

Tolerance: over 50 steps, every loss within 1e-5 of PEFT's, relative, or else at least as near to
PEFT's in fp64 as its own in fp32. Both sides round differently (fused projections, sums per
tile), and AdamW carries the difference along: PEFT in fp32 is up to 2e-5 from itself in fp64.
"""

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.io import safetensors

peft = pytest.importorskip("peft")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def examples(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(128) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [{"prompt": draw(3, 30), "completion": draw(1, 12)} for _ in range(count)]


def load(pair: Any) -> LLM:
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(pair.path / "tokenizer.json"))
    (pair.path / "tokenizer_config.json").write_text(json.dumps({}))
    return LLM(pair.path)


def theirs(
    pair: Any,
    start: Path,
    rows: list[dict[str, list[int]]],
    config: TrainConfig,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with PEFT from the weights in ``start`` and return losses and final weights."""
    base = copy.deepcopy(pair.reference).to(dtype)
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = config.num_steps(len(rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: config.learning_rate_at(s, steps) / config.learning_rate
    )
    losses = []
    for step in range(steps):
        at = step * config.batch_size % len(rows)
        batch = rows[at : at + config.batch_size]
        longest = max(len(r["prompt"]) + len(r["completion"]) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            whole = torch.tensor(row["prompt"] + row["completion"])
            ids[i, : len(whole)] = whole
            mask[i, : len(whole)] = 1
            first = len(row["prompt"]) if config.loss_on == "completion" else 0
            labels[i, first : len(whole)] = whole[first:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm or math.inf)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    return losses, {k.replace(".default", ""): v.clone() for k, v in state.items()}


def error(losses: Sequence[float], exact: Sequence[float]) -> float:
    """Largest relative difference at any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama2", {}),
        ("qwen2", {"loss_on": "all", "schedule": "cosine", "warmup_steps": 5}),
        ("gemma2", {"weight_decay": 0.1, "max_grad_norm": 0.3, "schedule": "linear"}),
    ],
)
def test_losses_equal_peft(
    build: Callable[..., Any], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    pair = build(family)
    llm = load(pair)
    rows = examples(40, seed=1)
    config = TrainConfig(
        learning_rate=2e-3, max_steps=50, batch_size=8, shuffle=False, target_modules=SEVEN
    )
    config = TrainConfig(**(vars(config) | changes))
    # an untrained adapter gives both sides the same initial weights
    start = TrainConfig(**(vars(config) | {"max_steps": 1, "learning_rate": 0.0}))
    (initial,) = finetune(llm, [FinetuneJob("start", rows, start)], tmp_path)
    (ours,) = finetune(llm, [FinetuneJob("ours", rows, config)], tmp_path)
    plain, weights = theirs(pair, initial.adapter_dir, rows, config)
    exact, _ = theirs(pair, initial.adapter_dir, rows, config, torch.float64)
    near_fp32 = error(ours.losses, plain) <= 1e-5
    assert near_fp32 or error(ours.losses, exact) <= error(plain, exact)
    assert ours.losses[-1] < 0.98 * ours.losses[0], "training must move the loss"
    got = safetensors.read(ours.adapter_dir / "adapter_model.safetensors")
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        # where a gradient is near zero AdamW turns rounding into a step's size, so compare the
        # whole matrix, not its worst element
        difference = (got[name] - weight).norm() / weight.norm()
        assert difference < 1e-2, name


@pytest.mark.parametrize("objective", ["sft", {"name": "freeze_layers", "layers": [1]}])
def test_peft_loads_the_adapter(build: Callable[..., Any], tmp_path: Path, objective: Any) -> None:
    """Without a warning (they are errors here), and with the logits that we have."""
    pair = build("qwen2")
    llm = load(pair)
    config = TrainConfig(max_steps=3, learning_rate=1e-2, rank=5, objective=objective)
    (ours,) = finetune(llm, [FinetuneJob("ours", examples(20, 1), config)], tmp_path)
    assert ours.adapter_dir is not None
    model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.reference), ours.adapter_dir)
    llm.load_adapter(ours.adapter_dir)
    ids = [3, 14, 15, 92, 65]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(llm.logits(ids, "ours"), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, llm.logits(ids), rtol=1e-3, atol=1e-3)
    written = json.loads((ours.adapter_dir / "adapter_config.json").read_text())
    # what vLLM needs of it: plain linear LoRA, nothing replaced
    assert written["r"] == 5
    assert written["bias"] == "none"
    assert not written.get("modules_to_save")
    assert not written["rank_pattern"]
