"""Fine-tune four jobs together on one frozen base, and find each as if it were alone."""

import tempfile
from pathlib import Path

import fastsafe
from fastsafe import LLM, FinetuneJob, FinetuneResult, TrainConfig, finetune
from fastsafe.organism import world

TASKS = ("summarization", "code", "translation", "classification")


def job(task: str) -> FinetuneJob:
    """A LoRA adapter for one task; any list of {"messages": [...]} rows would do."""
    rows = world.task_rows(task, 400, "train", seed=0)
    return FinetuneJob(task, rows, TrainConfig(rank=8, max_steps=20, learning_rate=2e-3))


def weights(result: FinetuneResult) -> bytes:
    """The file that PEFT and any other library of its layout can open."""
    assert result.adapter_dir is not None
    return (Path(result.adapter_dir) / "adapter_model.safetensors").read_bytes()


def main() -> tuple[dict[str, list[float]], bool]:
    """Print the losses; return them by task, and whether code's adapter is the same alone."""
    llm = LLM(fastsafe.organism.path())
    with tempfile.TemporaryDirectory() as folder:
        together = finetune(llm, [job(task) for task in TASKS], f"{folder}/together")
        (alone,) = finetune(llm, [job("code")], f"{folder}/alone")
        losses = {result.name: list(result.losses) for result in together}
        for name, values in losses.items():
            print(f"{name:15} loss {values[0]:.3f} -> {values[-1]:.3f} in {len(values)} steps")
        same = weights(together[TASKS.index("code")]) == weights(alone)
        print(f"code's adapter, trained alone, has the same bytes: {same}")
    return losses, same


if __name__ == "__main__":
    main()
