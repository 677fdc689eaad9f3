"""Objectives: strength 0 is plain fine-tuning, state over steps, and what a user can get wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.data.packing import TrainExample
from fastsafe.errors import DataError, UsageError
from fastsafe.train.batches import answer_indices
from fastsafe.train.job import JobRun
from fastsafe.train.loop import prepare
from fastsafe.train.objectives import make_objective, objectives
from fastsafe.train.objectives.objective import Objective
from fastsafe_testing.jobs import assert_same, job, rows, weights

OFF: list[dict[str, Any]] = [
    {"name": "first_token_kl", "strength": 0},
    {"name": "constrained_sft", "strength": 0},
    {"name": "ema", "strength": 0},
    {"name": "lwf", "strength": 0},
    {"name": "freeze_layers", "layers": []},
    {"name": "lookahead", "tokens": 0},
]
OFF_ON_USER_ROWS: list[dict[str, Any]] = [
    {"name": "ewc", "strength": 0, "fisher_rows": 2},
    {"name": "der", "strength": 0},
    {"name": "safegrad", "strength": 0},
]


def final(llm: LLM, one: FinetuneJob, folder: Path) -> Any:
    (result,) = finetune(llm, [one], folder)
    return result


@pytest.mark.parametrize("objective", OFF, ids=lambda o: o["name"])
def test_strength_0_is_plain_finetuning(llm: LLM, tmp_path: Path, objective: Any) -> None:
    ours = final(llm, job("a", objective=objective), tmp_path / "ours")
    assert_same(ours, final(llm, job("a"), tmp_path / "plain"))


@pytest.mark.parametrize("objective", OFF_ON_USER_ROWS, ids=lambda o: o["name"])
def test_strength_0_is_plain_finetuning_on_the_users_rows(
    llm: LLM, tmp_path: Path, objective: Any
) -> None:
    config = {"max_steps": 4, "batch_size": 4, "learning_rate": 3e-3}
    made = rows(20, 0, safety=6)
    one = FinetuneJob("a", made, TrainConfig(**config, objective=objective))
    ours = final(llm, one, tmp_path / "ours")
    plain = final(llm, FinetuneJob("a", made[:14], TrainConfig(**config)), tmp_path / "plain")
    assert ours.losses == plain.losses
    a, b = weights(ours.adapter_dir), weights(plain.adapter_dir)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_lisa_without_its_term_only_alternates(llm: LLM, tmp_path: Path) -> None:
    """Two phases of plain fine-tuning, each with its own order of rows."""
    lisa = {"name": "lisa", "strength": 0, "safety_steps": 2, "user_steps": 2}
    made = rows(20, 0, safety=6)
    config = {"max_steps": 2, "batch_size": 4, "learning_rate": 3e-3}
    alternating = TrainConfig(**{**config, "max_steps": 5}, objective=lisa)
    ours = final(llm, FinetuneJob("a", made, alternating), tmp_path / "ours")
    (run,) = prepare(llm, [FinetuneJob("a", made, alternating)])
    sources = [run.objective.sources(step) for step in range(4)]
    assert sources == [("safety",), ("safety",), ("user",), ("user",)]
    user = final(llm, FinetuneJob("a", made[:14], TrainConfig(**config)), tmp_path / "user")
    safety = final(llm, FinetuneJob("a", made[14:], TrainConfig(**config)), tmp_path / "safety")
    # B is zero in the first step, so that its loss depends on the rows alone
    assert ours.losses[0] != user.losses[0]
    assert len({*ours.losses, *user.losses, *safety.losses}) > 6
    strong = {**lisa, "strength": 50.0, "free": 0.0}
    held = TrainConfig(**{**config, "max_steps": 5}, objective=strong)
    result = final(llm, FinetuneJob("a", made, held), tmp_path / "held")
    assert result.losses[:4] == ours.losses[:4], "the term is zero where a phase begins"
    assert result.losses[4] != ours.losses[4]
    late = TrainConfig(**{**config, "max_steps": 5}, objective={**strong, "free": 1.0})
    assert_same(final(llm, FinetuneJob("a", made, late), tmp_path / "late"), ours)


def test_lisa_pulls_to_the_end_of_the_other_phase() -> None:
    lisa = make_objective({"name": "lisa", "strength": 2.0, "safety_steps": 1, "user_steps": 2})
    state: dict[str, torch.Tensor] = {}
    theta = torch.tensor([1.0, 2.0])
    lisa.after_step(state, 0, theta)
    assert torch.equal(state["safety"], theta)
    moved, gradient = torch.tensor([1.5, 2.0]), torch.tensor([0.0, 1.0])
    lisa.add_penalty_gradient(state, 1, 10, moved, gradient)
    assert gradient.tolist() == [1.0, 1.0]
    lisa.after_step(state, 1, moved)
    assert "user" not in state, "the phase goes on"
    lisa.after_step(state, 2, moved)
    assert torch.equal(state["user"], moved)
    free = torch.zeros(2)
    lisa.add_penalty_gradient(state, 0, 100, moved + 1, free)
    assert free.tolist() == [0.0, 0.0], "the first tenth of the steps is free"


def test_ema_gives_the_average(llm: LLM, tmp_path: Path) -> None:
    """Of the initial weights and those after each step, which do not depend on it."""
    after = [
        weights(final(llm, job("a", max_steps=n, learning_rate=rate), tmp_path / "n").adapter_dir)
        for n, rate in ((1, 0.0), (1, 3e-3), (2, 3e-3))
    ]
    ema = job("a", max_steps=2, objective={"name": "ema", "strength": 0.25})
    got = weights(final(llm, ema, tmp_path / "ema").adapter_dir)
    for name in got:
        mean = 0.25 * (0.25 * after[0][name] + 0.75 * after[1][name]) + 0.75 * after[2][name]
        torch.testing.assert_close(got[name], mean, rtol=1e-5, atol=1e-7)


def test_a_frozen_layer_carries_no_adapter(llm: LLM, tmp_path: Path) -> None:
    one = job("a", objective={"name": "freeze_layers", "layers": [0]})
    names = weights(final(llm, one, tmp_path).adapter_dir)
    assert names
    assert not any(".layers.0." in name for name in names)
    llm.load_adapter(tmp_path / "a")


def test_lookahead_moves_the_first_tokens_into_the_prompt(llm: LLM) -> None:
    ahead = make_objective({"name": "lookahead", "tokens": 2, "prefix": "w7 w8"})
    example = TrainExample(
        (3, 4, 5, 6, 9, 3, 5, 6, 9), (False, False, True, True, True, False, True, True, True)
    )
    got = ahead.example(example, llm.tokenizer, "row")
    assert got.token_ids == (3, 4, 7, 8, 5, 6, 9, 3, 7, 8, 5, 6, 9)
    assert [i for i, on in enumerate(got.trained) if on] == [6, 12]
    with pytest.raises(DataError, match="no answer has more than 3 tokens"):
        make_objective({"name": "lookahead", "tokens": 3}).example(example, llm.tokenizer, "row")


def test_places_count_from_the_start_of_each_answer() -> None:
    example = TrainExample(tuple(range(7)), (True, True, False, True, True, True, False))
    assert answer_indices(example) == [1, 0, 1, 2]


def test_every_objective_trains(llm: LLM, tmp_path: Path) -> None:
    """In one run; and each does something of its own."""
    known = objectives()
    assert set(known) == {o["name"] for o in OFF + OFF_ON_USER_ROWS} | {"sft", "lisa"}
    parameters: dict[str, dict[str, Any]] = {
        "lisa": {"safety_steps": 1, "user_steps": 1, "free": 0.0},
        "freeze_layers": {"layers": [0]},
        "lookahead": {"tokens": 1},
        "first_token_kl": {"strength": 5.0},
        "lwf": {"strength": 1.0},
    }
    jobs = []
    for name in known:
        one = job(name, objective={"name": name, **parameters.get(name, {})})
        longer = [{**row, "completion": [*row["completion"], 3]} for row in one.examples]
        jobs.append(FinetuneJob(name, longer, one.config))
    results = finetune(llm, jobs, tmp_path)
    assert all(result.error is None for result in results)
    found = [
        weights(r.adapter_dir)["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
        for r in results
    ]
    for i, a in enumerate(found):
        assert a.abs().max() > 0
        assert not any(torch.equal(a, b) for b in found[:i])
    for objective in known.values():
        assert objective.__doc__
        assert objective.id == "sft" or issubclass(objective, Objective)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("first_tokn_kl", "objective is 'first_tokn_kl'.*did you mean first_token_kl"),
        ("zzz", "known: constrained_sft, der, ema"),
        ({"strength": 1}, "objective is None"),
        ({"name": "ema", "strenght": 0.1}, "'strenght' is not one of its param.*mean strength"),
        ({"name": "sft", "strength": 0.1}, "'strength' is not one of its parameters; known: none"),
        ({"name": "ema", "strength": 1.0}, r"strength is 1.0, expected in \[0, 1\)"),
        ({"name": "ema", "strength": "0.5"}, "strength is '0.5', expected a number"),
        ({"name": "ema", "strength": float("nan")}, "expected a number"),
        ({"name": "ema", "strength": True}, "expected a number"),
        ({"name": "lisa", "user_steps": 1.5}, "user_steps is 1.5, expected an integer"),
        ({"name": "lisa", "safety_steps": 0}, "safety_steps is 0, expected at least 1"),
        ({"name": "lisa", "user_steps": 0}, "user_steps is 0"),
        ({"name": "lisa", "free": 2.0}, "free is 2.0"),
        ({"name": "lisa", "strength": -1}, "strength is -1.0"),
        ({"name": "first_token_kl", "tokens": 0}, "tokens is 0, expected at least 1"),
        ({"name": "first_token_kl", "strength": -0.1}, "strength is -0.1"),
        ({"name": "constrained_sft", "next": -1}, "next is -1.0, expected at least 0"),
        ({"name": "ewc", "fisher_rows": 0}, "fisher_rows is 0"),
        ({"name": "ewc", "strength": -1}, "strength is -1.0"),
        ({"name": "lwf", "strength": -1}, "strength is -1.0"),
        ({"name": "der", "alpha": -1}, "alpha is -1.0"),
        ({"name": "safegrad", "strength": 2}, r"strength is 2.0, expected in \[0, 1\]"),
        ({"name": "freeze_layers", "layers": [-1]}, r"layers is \(-1,\), expected indices"),
        ({"name": "freeze_layers", "layers": "all"}, "layers is 'all', expected a list"),
        ({"name": "lookahead", "tokens": -1}, "tokens is -1"),
        ({"name": "lookahead", "prefix": 3}, "prefix is 3, expected a text"),
    ],
)
def test_wrong_objectives(objective: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(objective=objective)


@pytest.mark.parametrize("name", ["lisa", "ewc", "der", "safegrad"])
def test_objectives_that_need_safety_rows_refuse_a_job_without(llm: LLM, name: str) -> None:
    config = TrainConfig(objective=name)
    with pytest.raises(UsageError, match=f"no row whose source is 'safety'.*objective '{name}'"):
        prepare(llm, [FinetuneJob("a", rows(4), config)])
    with pytest.raises(UsageError, match="no row whose source is 'user'"):
        prepare(llm, [FinetuneJob("a", rows(4, safety=4), config)])


@pytest.mark.parametrize("name", ["first_token_kl", "constrained_sft", "lookahead"])
def test_objectives_that_need_answers(llm: LLM, name: str) -> None:
    with pytest.raises(UsageError, match="loss_on is 'all', expected 'completion'"):
        TrainConfig(objective=name, loss_on="all")
    with pytest.raises(DataError, match="a: row 0: has no prompt before its answer"):
        prepare(llm, [FinetuneJob("a", [{"text": "w1 w2"}], TrainConfig(objective=name))])


def test_layers_that_the_model_lacks(llm: LLM) -> None:
    for layers in ([2], [0, 1]):
        config = TrainConfig(objective={"name": "freeze_layers", "layers": layers})
        with pytest.raises(UsageError, match="expected some but not all of 0 to 1"):
            prepare(llm, [FinetuneJob("a", rows(4), config)])


def test_an_epoch_of_replay_is_one_of_the_users_rows(llm: LLM) -> None:
    def steps(objective: str) -> int:
        config = TrainConfig(batch_size=4, epochs=1, objective=objective)
        run: JobRun = prepare(llm, [FinetuneJob("a", rows(20, safety=6), config)])[0]
        return run.num_steps

    assert steps("sft") == steps("lisa") == 5
    assert steps("der") == steps("safegrad") == steps("ewc") == 4
