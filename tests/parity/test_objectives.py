"""Gradient of every objective against its formula in plain torch, in fp64, over PEFT."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsafe import FinetuneJob, TrainConfig
from fastsafe.train.job import JobRun, MemorySaving
from fastsafe.train.loop import prepare

from .test_finetune import examples, load

peft = pytest.importorskip("peft")


class Oracle:
    """PEFT's model in fp64 with the adapter of a job, and what formulas need of a row."""

    def __init__(self, pair: Any, adapter_dir: Path) -> None:
        base = copy.deepcopy(pair.reference).double()
        self.model = peft.PeftModel.from_pretrained(base, adapter_dir, is_trainable=True).double()
        self.parameters = {
            name.replace(".default", "").removeprefix("base_model.model."): weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    def row(self, row: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V], final states [n, E] and targets [n] of the answer's tokens."""
        whole = torch.tensor([row["prompt"] + row["completion"]])
        out = self.model(input_ids=whole, output_hidden_states=True)
        at = slice(len(row["prompt"]) - 1, -1)
        return out.logits[0, at], out.hidden_states[-1][0, at], whole[0, len(row["prompt"]) :]

    def both(self, row: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same, and logits and states of the base."""
        logits, hidden, targets = self.row(row)
        with self.model.disable_adapter(), torch.no_grad():
            logits0, hidden0, _ = self.row(row)
        return logits, hidden, targets, logits0, hidden0

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        return dict(zip(self.parameters, found, strict=True))


def trained(rows: list[dict[str, Any]]) -> int:
    return sum(len(row["completion"]) for row in rows)


def cross_entropy(oracle: Oracle, rows: list[dict[str, Any]]) -> Tensor:
    losses = []
    for row in rows:
        logits, _, targets = oracle.row(row)
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
    return torch.stack(losses).sum() / trained(rows)


def first_token_kl(oracle: Oracle, rows: list[dict[str, Any]]) -> Tensor:
    kl = []
    for row in rows:
        logits, _, _, logits0, _ = oracle.both(row)
        p, q = logits.log_softmax(-1)[:2], logits0.log_softmax(-1)[:2]
        kl.append((q.exp() * (q - p)).sum())
    return cross_entropy(oracle, rows) + 0.5 * torch.stack(kl).sum() / len(rows)


def constrained_sft(oracle: Oracle, rows: list[dict[str, Any]]) -> Tensor:
    losses = []
    for row in rows:
        logits, _, targets, logits0, _ = oracle.both(row)
        now, then = (x.log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (logits, logits0))
        beta = torch.tensor([0.5, 2, 2, 2, 2] + [0.1] * 20, dtype=torch.float64)[: len(targets)]
        losses.append(-(2 / beta * F.logsigmoid(beta * (now - then))).sum())
    return torch.stack(losses).sum() / trained(rows)


def lwf(oracle: Oracle, rows: list[dict[str, Any]]) -> Tensor:
    distances = []
    for row in rows:
        _, hidden, _, _, hidden0 = oracle.both(row)
        distances.append((hidden - hidden0).square().sum())
    return cross_entropy(oracle, rows) + 0.3 * torch.stack(distances).sum() / trained(rows)


def replay(oracle: Oracle, rows: list[dict[str, Any]]) -> Tensor:
    distances = []
    for row in rows:
        logits, _, _, logits0, _ = oracle.both(row)
        distances.append((logits - logits0).square().mean(-1).sum())
    alpha = torch.stack(distances).sum() / trained(rows)
    return 0.7 * alpha + 0.2 * cross_entropy(oracle, rows)


def start(
    build: Callable[..., Any], tmp_path: Path, objective: Any, family: str
) -> tuple[JobRun, Oracle]:
    """A job with an adapter that is not zero, and the oracle of its weights."""
    pair = build(family)
    rows = examples(12, seed=1)
    for row in rows:
        row["completion"] = [*row["completion"], 5, 6]
    safety = [{**row, "source": "safety"} for row in rows[8:]]
    config = TrainConfig(
        batch_size=20, rank=4, objective=objective, target_modules=["q_proj", "o_proj", "up_proj"]
    )
    (run,) = prepare(load(pair), [FinetuneJob("a", rows[:8] + safety, config)])
    run.enter()
    assert run._slot
    generator = torch.Generator().manual_seed(0)
    run._slot.weights.flat.add_(
        0.02 * torch.randn(run._slot.weights.flat.shape, generator=generator)
    )
    run._slot.weights.refresh()
    run._slot.weights.save(tmp_path / "a")
    return run, Oracle(pair, tmp_path / "a")


def gradients(run: JobRun) -> dict[str, Tensor]:
    """Gradient [P] of a step's batch of each source."""
    for tile in run.tiles():
        run.add(tile, *run.gradient(tile, MemorySaving()))
    return dict(run._gradients)


def as_matrices(run: JobRun, flat: Tensor) -> dict[str, Tensor]:
    """A flat vector under the names of the adapter's matrices."""
    assert run._slot
    lora = run._slot.weights
    kept = lora.flat.clone()
    lora.flat.copy_(flat)
    found = {}
    for module, weights in lora.adapter("g").weights.items():
        found[f"{module}.lora_A.weight"] = weights.lora_A
        found[f"{module}.lora_B.weight"] = weights.lora_B
    lora.flat.copy_(kept)
    return found


def assert_equal(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        difference = (ours[name].double() - gradient).norm() / gradient.norm()
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize("family", ["llama2", "gemma2"])
@pytest.mark.parametrize(
    ("objective", "formula"),
    [
        ("sft", cross_entropy),
        ({"name": "first_token_kl", "strength": 0.5, "tokens": 2}, first_token_kl),
        ("constrained_sft", constrained_sft),
        ({"name": "lwf", "strength": 0.3}, lwf),
    ],
)
def test_gradient_of_the_loss(
    build: Callable[..., Any],
    tmp_path: Path,
    objective: Any,
    formula: Callable[[Oracle, list[dict[str, Any]]], Tensor],
    family: str,
) -> None:
    run, oracle = start(build, tmp_path, objective, family)
    rows = [decoded(example) for example in run.rows["all"]]
    loss = formula(oracle, rows)
    assert_equal(as_matrices(run, gradients(run)["all"]), oracle.gradient(loss))
    if objective != "constrained_sft":  # which reports its weighted cross-entropy
        assert run._loss == pytest.approx(loss.item(), rel=1e-5)


def decoded(example: Any) -> dict[str, Any]:
    begin = example.trained.index(True)
    ids = list(example.token_ids)
    return {"prompt": ids[:begin], "completion": ids[begin:]}


def test_replay(build: Callable[..., Any], tmp_path: Path) -> None:
    objective = {"name": "der", "alpha": 0.7, "beta": 0.2}
    run, oracle = start(build, tmp_path, objective, "llama2")
    user, safety = ([decoded(e) for e in run.rows[s]] for s in ("user", "safety"))
    loss = cross_entropy(oracle, user) + replay(oracle, safety)
    combined = run.objective.combine(gradients(run))
    assert_equal(as_matrices(run, combined), oracle.gradient(loss))
    assert run._loss == pytest.approx(loss.item(), rel=1e-5)


def test_projection_of_a_conflict(build: Callable[..., Any], tmp_path: Path) -> None:
    run, oracle = start(build, tmp_path, "safegrad", "llama2")
    user, safety = (
        oracle.gradient(cross_entropy(oracle, [decoded(e) for e in run.rows[s]]))
        for s in ("user", "safety")
    )
    ours = gradients(run)
    assert_equal(as_matrices(run, ours["user"]), user)
    assert_equal(as_matrices(run, ours["safety"]), safety)
    # for a conflict, turn the safety rows' gradient around; without one nothing is taken
    for sign in (1, -1):
        dot = sign * sum((user[k] * safety[k]).sum() for k in user)
        square = sum(x.square().sum() for x in safety.values())
        share = sign * dot / square if dot < 0 else 0.0
        exact = {k: user[k] - share * safety[k] for k in user}
        turned = {"user": ours["user"].clone(), "safety": sign * ours["safety"]}
        assert_equal(as_matrices(run, run.objective.combine(turned)), exact)


def test_fisher_information(build: Callable[..., Any], tmp_path: Path) -> None:
    objective = {"name": "ewc", "strength": 3.0, "fisher_rows": 2}
    run, oracle = start(build, tmp_path, objective, "llama2")
    assert run._slot
    slot = run._slot
    state = run.objective.initial_state(slot.weights.flat, partial(run._row_gradients, slot))
    rows = [decoded(e) for e in run.rows["safety"][:2]]
    squares = [oracle.gradient(cross_entropy(oracle, [row])) for row in rows]
    fisher = {k: (squares[0][k] ** 2 + squares[1][k] ** 2) / 2 for k in squares[0]}
    assert_equal(as_matrices(run, state["fisher"]), fisher)
    moved = slot.weights.flat + 0.25
    pulled = torch.zeros_like(moved)
    run.objective.add_penalty_gradient(state, 0, 10, moved, pulled)
    exact = {k: 3.0 * fisher[k] * 0.25 for k in fisher}
    assert_equal(as_matrices(run, pulled), exact)
