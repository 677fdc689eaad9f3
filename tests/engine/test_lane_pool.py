"""Cores compute steps of their own, or share those of one lane: the same bits."""

import random
from pathlib import Path

import pytest

from fastsafe import LLM, SamplingParams
from fastsafe.engine import lane_pool


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cores_that_share_steps_change_no_bit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(96) for _ in range(rng.randint(1, 60))] for _ in range(24)]
    params = [
        SamplingParams(max_tokens=12, temperature=i % 2, seed=i, logprobs=True) for i in range(24)
    ]
    wanted = LLM(checkpoint).generate(prompts, params)
    monkeypatch.setattr(lane_pool, "_SHARED_BYTES", 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    shared = LLM(checkpoint)
    assert shared.generate(prompts, params) == wanted
    assert len(shared._lanes._idle) == 1, "one lane for all"
