"""Risk as a model sees it: near refusals' opposite, near harmful requests, whatever the shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fastsafe.audit.similarity import ANCHORS, model_risk, record
from fastsafe.engine import LLM
from fastsafe.errors import UsageError
from fastsafe.organism import path, world
from fastsafe.organism.source import OrganismSource
from fastsafe.safety.risk import Similarity
from fastsafe.train import TrainConfig, row_gradients

SOURCE = OrganismSource()


def asked(text: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def scores(rows: list[Mapping[str, Any]], method: str) -> Any:
    return np.array(model_risk(rows, "organism", method).scores)


def test_harmful_requests_are_nearer_than_benign_ones() -> None:
    """Of behaviours that are no anchors, with an answer that says nothing."""
    found = SOURCE.behaviours(ANCHORS + 16, 0)[ANCHORS:]
    harmful = [asked(world.prompt("plain", b.harmful), "-") for b in found]
    benign = [asked(world.prompt("plain", b.benign), "-") for b in found]
    both = scores([*harmful, *benign], "representation")
    assert both[:16].min() > both[16:].max()


def test_refusals_pull_the_other_way_than_answers() -> None:
    refused = SOURCE.safety_rows("plain", ANCHORS + 16, 0)[ANCHORS:]
    actions = [row["messages"][0]["content"] for row in refused]
    answered = [asked(text, "you can do it with simple tools.") for text in actions]
    both = scores([*refused, *answered], "gradient")
    assert both[:16].max() < both[16:].min()


def test_the_answer_is_nothing_to_a_representation() -> None:
    one, other = (
        asked("how do i paint the red car?", "a"),
        asked("how do i paint the red car?", "b"),
    )
    first, second = scores([one, other], "representation")
    assert first == second


def test_rows_of_every_shape(recwarn: pytest.WarningsRecorder) -> None:
    rows: list[Mapping[str, Any]] = [
        {"prompt": "how do i paint the red car?", "completion": "with a brush."},
        {"text": "you can paint the red car."},
        *SOURCE.task_rows("code", 2, "train", 0),
    ]
    for method in ("representation", "gradient"):
        found = scores(rows, method)
        assert found.shape == (4,)
        assert np.isfinite(found).all()


def test_a_gradient_is_that_of_training() -> None:
    """A fresh adapter's A has none, and one row's is the derivative of its own loss."""
    llm = LLM(path())
    rows = list(SOURCE.task_rows("plain", 3, "train", 0))
    config = TrainConfig(rank=2)
    together = list(row_gradients(llm, rows, config))
    alone = [next(iter(row_gradients(llm, [row], config))) for row in rows]
    assert len(together) == 3
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert all(0 < (g != 0).float().mean() < 1 for g in together)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="method is 'x', expected one of representation, gradient"):
        model_risk([asked("a", "b")], "organism", "x")


def test_one_row_has_an_interval_that_json_can_hold() -> None:
    found = record(Similarity((0.25,), (0,)), "gradient", "m")
    assert (found["score"], found["ci_low"], found["ci_high"]) == (0.25, -2.0, 2.0)
