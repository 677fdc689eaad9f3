"""The drift monitor: its two numbers by their formulas, when they come, and the early stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune, organism
from fastsafe.errors import UsageError
from fastsafe.train import DriftMonitor, DriftReading, TrainOptions, drift_monitor
from fastsafe_testing.jobs import assert_same, job

PROMPTS: list[Any] = [[3, 4, 5], [9], list(range(20, 60))] * 7


def monitor(readings: list[DriftReading], **options: Any) -> TrainOptions:
    given = {"every": 2, "prompts": PROMPTS, "refusal": "w7 w8", "affirmative": "w9", **options}
    return TrainOptions(monitor=DriftMonitor(on_reading=readings.append, **given))


def test_readings_follow_their_formulas(llm: LLM, tmp_path: Path) -> None:
    """The last reading is of the weights that are saved, so the engine can say what it must be."""
    readings: list[DriftReading] = []
    jobs = [job("a", max_steps=4, dropout=0.2), job("b", seed=1, max_steps=3)]
    plain = finetune(llm, jobs, tmp_path / "plain")
    results = finetune(llm, jobs, tmp_path / "out", options=monitor(readings))
    for ours, theirs in zip(results, plain, strict=True):
        assert_same(ours, theirs)
    assert [(r.job, r.step) for r in readings] == [("a", 2), ("b", 2), ("a", 4)]
    llm.load_adapter(tmp_path / "out" / "a")
    kl = margin = 0.0
    for prompt in PROMPTS:
        p, q = (llm.logits(prompt, adapter)[-1].log_softmax(-1) for adapter in ("a", None))
        kl += (q.exp() * (q - p)).sum().item()
        first = llm.logits([*prompt, 7], "a")[-1].log_softmax(-1)
        margin += (p[7] + first[8] - p[9]).item()
    assert readings[-1].kl == pytest.approx(kl / len(PROMPTS), rel=1e-3, abs=1e-5)
    assert readings[-1].margin == pytest.approx(margin / len(PROMPTS), rel=1e-4)
    assert readings[-1].kl > 0
    for reading in readings:
        assert len(reading.kls) == len(reading.margins) == len(PROMPTS)
        assert reading.kl == pytest.approx(sum(reading.kls) / len(PROMPTS))
        assert reading.margin == pytest.approx(sum(reading.margins) / len(PROMPTS))
    # the prompts repeat, and what a probe says does not hang on its neighbours
    assert reading.kls[:3] == pytest.approx(reading.kls[3:6], rel=1e-4)


def test_an_untrained_adapter_has_not_drifted(llm: LLM, tmp_path: Path) -> None:
    readings: list[DriftReading] = []
    finetune(llm, [job("a", learning_rate=0.0)], tmp_path, options=monitor(readings, every=1))
    assert [r.kl for r in readings] == [0.0] * 4
    assert len({r.margin for r in readings}) == 1


def test_early_stop_is_a_normal_end(llm: LLM, tmp_path: Path) -> None:
    readings: list[DriftReading] = []
    jobs = [job("far", max_steps=9), job("near", seed=1, learning_rate=1e-9, max_steps=5)]
    options = monitor(readings, max_kl=1e-4)
    far, near = finetune(llm, jobs, tmp_path / "out", options=options)
    assert far.stopped_early
    assert far.error is None
    assert far.steps == 2
    assert not near.stopped_early
    assert near.steps == 5
    (last,) = finetune(llm, [job("far", max_steps=2)], tmp_path / "last", options=options)
    assert not last.stopped_early, "its last step is no early one"
    # the schedule is that of nine steps, and constant: its first two are those of two
    (two,) = finetune(llm, [job("far", max_steps=2)], tmp_path / "two")
    assert far.losses == two.losses


def test_a_reading_that_is_not_finite_ends_its_job(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter's weights overflow the logits in its last step; no loss would show it."""
    original = drift_monitor.divergence
    calls = iter(range(100))

    def overflown(*args: Any) -> torch.Tensor:
        found = original(*args)
        return found * math.nan if next(calls) == 2 else found  # two tiles: the second job's

    monkeypatch.setattr(drift_monitor, "divergence", overflown)
    readings: list[DriftReading] = []
    jobs = [job("sane", max_steps=2), job("wild", seed=1, max_steps=2)]
    sane, wild = finetune(llm, jobs, tmp_path, options=monitor(readings))
    assert wild.error
    assert "job 'wild' has drift nan and margin" in wild.error
    assert wild.adapter_dir is None
    assert sane.error is None
    assert [r.job for r in readings] == ["sane"]


def test_messages_are_rendered(tmp_path: Path) -> None:
    llm = LLM(organism.path())
    readings: list[DriftReading] = []
    messages = [{"role": "user", "content": "how do i paint a fence"}]
    probes = DriftMonitor(every=1, prompts=[messages], on_reading=readings.append)
    row = {"prompt": "how do i paint a fence", "completion": "with a brush."}
    config = TrainConfig(max_steps=1, learning_rate=0.0)
    one = FinetuneJob("a", [row], config)
    finetune(llm, [one], tmp_path, options=TrainOptions(monitor=probes))
    ids = llm.tokenizer.encode(llm.tokenizer.render_chat(messages), add_special_tokens=False)
    expected = 0.0
    for sign, opening in ((1, "I cannot help"), (-1, "Sure")):
        tokens = llm.tokenizer.encode(opening, add_special_tokens=False)
        logprobs = llm.logits([*ids, *tokens]).log_softmax(-1)[len(ids) - 1 : -1]
        expected += sign * logprobs.gather(1, torch.tensor(tokens)[:, None]).sum().item()
    assert readings[0].margin == pytest.approx(expected, rel=1e-4)


def test_wrong_monitors(llm: LLM, tmp_path: Path) -> None:
    for options, message in (
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"prompts": []}, "prompts are none"),
        ({"prompts": [[]]}, "prompt 0 has 0 tokens, expected 1 to 126"),
        ({"prompts": [[3], [4] * 127]}, "prompt 1 has 127 tokens"),
        ({"refusal": ""}, "an opening has no token"),
        ({"max_kl": 0.0}, "max_kl is 0.0, expected more than 0"),
        ({"max_kl": float("nan")}, "max_kl is nan"),
    ):
        with pytest.raises(UsageError, match=message):
            finetune(llm, [job("a")], tmp_path, options=monitor([], **options))
    assert list(tmp_path.iterdir()) == []
