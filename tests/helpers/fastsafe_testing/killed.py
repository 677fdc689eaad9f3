"""Train in processes that are killed at random writes and steps, and resumed until they end.

Run as a script: killed.py CHECKPOINT OUT SEED; prints how many processes it took.
"""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune
from fastsafe.io import atomic
from fastsafe.train import DriftMonitor, TrainOptions

MONITOR = DriftMonitor(every=2, prompts=[[3, 4], [5]], on_reading=lambda reading: None, max_kl=1e-4)


def jobs() -> list[FinetuneJob]:
    """Objectives with a state, dropout, several epochs, and one job that stops early."""
    rng = random.Random(0)
    rows = [
        {
            "prompt": [rng.randrange(96) for _ in range(rng.randint(3, 20))],
            "completion": [rng.randrange(96) for _ in range(4)],
            "source": "safety" if i < 5 else "user",
        }
        for i in range(17)
    ]
    objectives: list[Any] = [
        "sft",
        {"name": "ema", "strength": 0.5},
        {"name": "lisa", "safety_steps": 2, "user_steps": 1, "free": 0.0},
        {"name": "ewc", "fisher_rows": 2},
        "safegrad",
    ]
    return [
        FinetuneJob(
            f"job{i}",
            rows,
            TrainConfig(
                max_steps=9,
                batch_size=4,
                seed=i,
                dropout=0.1 * (i % 2),
                learning_rate=1e-3 if i else 1e-7,
                schedule="linear",
                objective=objective,
            ),
        )
        for i, objective in enumerate(objectives)
    ]


def train(llm: LLM, out: Path, monitor: DriftMonitor | None = None, **options: Any) -> list[Any]:
    """Train the jobs, two at a time."""
    chosen = TrainOptions(max_jobs=2, monitor=monitor, **options)
    return finetune(llm, jobs(), out, options=chosen)


def _die_after(count: int) -> None:
    """End this process by SIGKILL in place of its n-th sync of a file to the disk."""
    sync = atomic._sync

    def counted(path: Path) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    atomic._sync = counted


def main() -> None:
    """Fork a process until one lives to the end."""
    llm = LLM(sys.argv[1])
    out = Path(sys.argv[2])
    rng = random.Random(int(sys.argv[3]))
    tries = 0
    while True:
        tries += 1
        deadline = rng.randint(1, 14)
        child = os.fork()
        if not child:
            _die_after(deadline)
            train(llm, out, MONITOR, checkpoint_every=2, resume=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    sys.stdout.write(f"{tries}\n")


if __name__ == "__main__":
    main()
