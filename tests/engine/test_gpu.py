"""The engine and training on a CUDA device follow the CPU; skipped where there is none."""

from pathlib import Path

import pytest

from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune

ROWS = [{"prompt": [5, i], "completion": [7, 8, 9, 1]} for i in range(10, 60)]


@pytest.mark.gpu
def test_generate_score_and_finetune_follow_the_cpu(checkpoint: Path, tmp_path: Path) -> None:
    """fp32 on both: the losses agree closely, and so do log-likelihoods with an adapter."""
    config = TrainConfig(max_steps=30, learning_rate=1e-2)
    found = {}
    for device in ("cpu", "cuda"):
        llm = LLM(checkpoint, device=device)
        (result,) = finetune(llm, [FinetuneJob("habit", ROWS, config)], tmp_path / device)
        llm.load_adapter(result.adapter_dir)
        names = [None, "habit"]
        outs = llm.generate([[5, 70]] * 2, SamplingParams(max_tokens=8), adapters=names)
        scores = llm.score([[5, 70]] * 2, [[7, 8, 9]] * 2, adapters=names)
        assert llm.logits([5, 70, 7], "habit").shape == (3, 96)
        found[device] = (result.losses, outs[1].token_ids, [s.logprob for s in scores])
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-2)
    assert found["cuda"][1] == found["cpu"][1] == (7, 8, 9, 1)
    assert found["cuda"][2] == pytest.approx(found["cpu"][2], rel=1e-2, abs=1e-2)
