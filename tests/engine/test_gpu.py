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


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [True, False])
def test_a_graph_replays_with_any_adapters(checkpoint: Path, strict: bool) -> None:
    """Captured with one adapter, replayed with 2, 17 and all 24: as without a graph."""
    import torch

    from fastsafe.engine.gpu_lane import DeviceLane
    from fastsafe.model.lora import Adapter, LoraWeights
    from fastsafe.model.peft import LoraConfig

    llm = LLM(checkpoint, device="cuda", adapters="mixed", batch_size=32, strict=strict)
    config = LoraConfig(rank=4, alpha=4.0, target_modules=("q_proj", "down_proj"))
    for i in range(24):
        torch.manual_seed(i)
        weights = {
            module: LoraWeights(
                0.3 * torch.randn(4, slot.in_features),
                0.3 * torch.randn(slot.end - slot.begin, 4),
                1.0,
            )
            for module, slot in llm.model.slots().items()
            if module.endswith(config.target_modules)
        }
        llm.bank.add(Adapter(f"a{i}", config, weights))
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
    many = [[5 + i, 6, 7] for i in range(32)]
    captured = []
    for count in (1, 2, 17, 24):
        names = [f"a{i % count}" for i in range(32)]
        captured.append((names, llm.generate(many, params, names)))
    lane = llm._lanes._idle[0]
    assert isinstance(lane, DeviceLane)
    assert lane._graphs
    with pytest.MonkeyPatch.context() as patch:

        class Eager:
            """Runs the step instead of replaying it."""

            def __init__(self, *args: object) -> None:
                self.replay = lambda: lane._step(*args)

        lane._graphs.clear()
        patch.setattr(lane, "_capture", Eager)
        for names, want in captured:
            assert llm.generate(many, params, names) == want
    if strict:
        names, want = captured[-1]
        alone = [
            llm.generate([p], params, [n])[0] for p, n in zip(many[:5], names[:5], strict=True)
        ]
        assert alone == want[:5]


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device(checkpoint: Path) -> None:
    import torch

    llm = LLM(checkpoint, device="cuda", batch_size=32)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    want = llm.generate([[5, 6, 7]] * 40, params)
    lane = llm._lanes._idle[0]
    launch = lane._launch

    def watched(*args: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "_launch", watched)
        assert llm.generate([[5, 6, 7]] * 40, params) == want
