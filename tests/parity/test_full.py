"""Full fine-tuning equals transformers with torch's AdamW on the same batches, in fp32.

Tolerance: over 20 steps every loss within 1e-5 of theirs, relative, or else at least as near to
theirs in fp64 as their own in fp32: AdamW makes a step of a rounding where a gradient is near 0.
"""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model.attention import PackedAttention
from fastsafe.model.transformer import Transformer
from fastsafe.train.optim import AdamW
from fastsafe.train.trained_full import TrainedFull
from fastsafe_kernels import token_logprobs

STEPS = 20
RATE = 3e-4


# transformers gives the row of its padding token, 0 here, no gradient
def batches(seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    draw = lambda: [rng.randint(1, 127) for _ in range(rng.randint(4, 40))]  # noqa: E731
    return [[draw() for _ in range(6)] for _ in range(4)]


def ours(
    model: Transformer, rows: Sequence[Sequence[list[int]]]
) -> tuple[list[float], Transformer]:
    trained = TrainedFull(model, Path())
    optimizer = AdamW(trained.flat, 0.01, 1.0)
    losses = []
    for step in range(STEPS):
        batch = rows[step % len(rows)]
        lengths = [len(r) - 1 for r in batch]
        ids = torch.tensor([t for r in batch for t in r[:-1]])
        targets = torch.tensor([t for r in batch for t in r[1:]])
        positions = torch.cat([torch.arange(n) for n in lengths])
        project = trained.projection()
        hidden = project.model.forward(ids, positions, PackedAttention(lengths), project)
        loss = -token_logprobs(project.model.logits(hidden), targets).mean()
        loss.backward()
        optimizer.step(project.gradient, RATE)
        trained.refresh()
        losses.append(loss.item())
    return losses, trained.model


def theirs(
    reference: Any, rows: Sequence[Sequence[list[int]]], dtype: torch.dtype
) -> tuple[list[float], Any]:
    model = copy.deepcopy(reference).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        batch = rows[step % len(rows)]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def error(losses: Sequence[float], exact: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True))


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "gemma2", "qwen3"])
def test_losses_equal_transformers(build: Callable[..., Any], family: str) -> None:
    pair = build(family)
    rows = batches(1)
    losses, model = ours(pair.model, rows)
    plain, reference = theirs(pair.reference, rows, torch.float32)
    exact, _ = theirs(pair.reference, rows, torch.float64)
    assert error(losses, plain) <= 1e-5 or error(losses, exact) <= error(plain, exact)
    assert losses[16] < 0.95 * losses[0], "the first batch again: training must move its loss"
    state = reference.state_dict()
    for name, tensor in model.tensors().items():
        assert (tensor - state[name]).norm() <= 1e-3 * state[name].norm(), name


def test_transformers_loads_what_is_saved(build: Callable[..., Any], tmp_path: Path) -> None:
    pair = build("qwen2")
    trained = TrainedFull(pair.model, pair.path)
    trained.flat *= 1.01
    trained.save(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, tensor in Transformer.load(Checkpoint(tmp_path / "tuned")).tensors().items():
        assert torch.equal(again.state_dict()[name], tensor), name
