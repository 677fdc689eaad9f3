"""Whole models among adapters: same loop, same interface, a checkpoint as the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.errors import UsageError
from fastsafe.train import TrainOptions, plan_training

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(3, 19)]
FULL = TrainConfig(method="full", learning_rate=2e-4, max_steps=4, batch_size=16)
LORA = TrainConfig(rank=4, learning_rate=1e-2, max_steps=4, batch_size=4)


def test_a_whole_model_trains_beside_an_adapter(llm: Any, tmp_path: Path) -> None:
    before = [t.clone() for t in llm.model.parameters()]
    jobs = [FinetuneJob("whole", ROWS, FULL), FinetuneJob("adapter", ROWS, LORA)]
    whole, adapter = finetune(llm, jobs, tmp_path / "together")
    (alone,) = finetune(llm, jobs[1:], tmp_path / "alone")
    assert adapter.losses == alone.losses
    assert whole.losses[-1] < whole.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, llm.model.parameters(), strict=True))
    tuned = LLM(whole.adapter_dir)
    assert not torch.equal(tuned.model.embedding, llm.model.embedding)
    assert tuned.generate(["w3 w4"])[0].num_prompt_tokens == 2


def test_a_whole_model_goes_on_from_its_checkpoint(llm: Any, tmp_path: Path) -> None:
    (unbroken,) = finetune(llm, [FinetuneJob("whole", ROWS, FULL)], tmp_path / "unbroken")
    options = TrainOptions(checkpoint_every=2, resume=True)

    def stop(step: int, losses: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    jobs = [FinetuneJob("whole", ROWS, FULL)]
    with pytest.raises(KeyboardInterrupt):
        finetune(llm, jobs, tmp_path / "broken", stop, options=options)
    (resumed,) = finetune(llm, jobs, tmp_path / "broken", options=options)
    assert resumed.losses == unbroken.losses
    files = [r.adapter_dir / "model.safetensors" for r in (unbroken, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (again,) = finetune(llm, jobs, tmp_path / "broken", options=options)
    assert again.losses == unbroken.losses


def test_its_memory_is_that_of_all_weights(llm: Any) -> None:
    plan = plan_training(llm, [FinetuneJob("whole", ROWS, FULL)])
    weights = sum(t.numel() for t in llm.model.parameters())
    assert plan.jobs[0].gradient_bytes == 4 * weights
    assert plan.jobs[0].adapter_bytes == 16 * weights


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"method": "all"}, "method is 'all', expected 'lora' or 'full'"),
        ({"method": "full", "dropout": 0.1}, "dropout is 0.1, expected 0 where method is 'full'"),
        (
            {"method": "full", "objective": {"name": "freeze_layers", "layers": [0]}},
            "expected 'lora' for objective 'freeze_layers'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        TrainConfig(**setting)
