"""Fine-tuning through PEFT, job by job: rows, order, mask and schedule as in fastsafe.train."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.errors import TrainingError, UsageError
from fastsafe.model import adapter_files
from fastsafe.train.batches import BatchSampler, check_lengths
from fastsafe.train.config import FinetuneJob, FinetuneResult, check_jobs
from fastsafe.transformers_backend.transformers_llm import TransformersLLM

_ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def finetune(
    llm: TransformersLLM,
    jobs: Sequence[FinetuneJob],
    out_dir: str | Path,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> list[FinetuneResult]:
    """Train one LoRA adapter per job; see ``fastsafe.train.finetune``.

    Args:
        llm: The base.
        jobs: What to train; names are unique and name directories.
        out_dir: Each adapter is written to ``out_dir/<job name>`` in PEFT's layout, when it is
            done.
        on_step: Called after every step of a job with its index and the job's loss.

    Raises:
        UsageError: Names clash or cannot be directory names, or a job asks for whole weights or
            another objective than next-token cross-entropy.
        DataError: A row is malformed or has nothing to train on.
        TrainingError: A loss is not finite.
    """
    check_jobs(jobs)
    for job in jobs:
        for key, expected in (("method", "lora"), ("objective", "sft")):
            value = getattr(job.config, key)
            if value != expected:
                raise UsageError(
                    f"finetune: job {job.name!r} has {key} {value!r}, expected {expected!r}; "
                    "the backend fastsafe trains the others"
                )
    examples = [_encoded(llm, job) for job in jobs]
    return [
        _train(llm, job, rows, Path(out_dir), on_step)
        for job, rows in zip(jobs, examples, strict=True)
    ]


def _encoded(llm: TransformersLLM, job: FinetuneJob) -> list[TrainExample]:
    rows = [
        encode_row(row, llm.tokenizer, loss_on=job.config.loss_on, location=f"{job.name}: row {i}")
        for i, row in enumerate(job.examples)
    ]
    check_lengths(job.name, rows, llm.max_positions)
    return rows


def _train(
    llm: TransformersLLM,
    job: FinetuneJob,
    rows: Sequence[TrainExample],
    out_dir: Path,
    on_step: Callable[[int, Mapping[str, float]], None] | None,
) -> FinetuneResult:
    config = job.config
    lora = config.lora(str(llm.path))
    began = time.monotonic()
    name = f"{job.name} in training"  # no job can be called so
    llm.add_adapter(name, lora)
    try:
        weights = llm.adapter_weights(name)
        _initialise(weights, config.seed)
        with llm.using(name), torch.random.fork_rng():
            torch.manual_seed(config.seed)  # of dropout
            llm.model.train()
            losses, num_tokens = _steps(llm, job, rows, list(weights.values()), on_step)
        folder = out_dir / job.name
        saved = {key: weight.detach().cpu() for key, weight in weights.items()}
        adapter_files.write_dir(folder, lora, saved)
    finally:
        llm.model.eval()
        llm.unload_adapter(name)
    return FinetuneResult(
        name=job.name,
        adapter_dir=folder,
        losses=tuple(losses),
        num_tokens=num_tokens,
        seconds=time.monotonic() - began,
    )


def _steps(
    llm: TransformersLLM,
    job: FinetuneJob,
    rows: Sequence[TrainExample],
    weights: list[Tensor],
    on_step: Callable[[int, Mapping[str, float]], None] | None,
) -> tuple[list[float], int]:
    config = job.config
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=config.weight_decay)
    num_steps = config.num_steps(len(rows))
    sampler = BatchSampler(rows, config.batch_size, config.seed, config.shuffle)
    losses, num_tokens = [], 0
    for step in range(num_steps):
        batch = sampler.next()
        num_tokens += sum(len(example.token_ids) for example in batch)
        loss = _loss(llm.model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm or math.inf)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise TrainingError(
                f"finetune: job {job.name!r} has loss {loss.item()} and a gradient of norm"
                f" {norm.item()} at step {step}; lower its learning rate or check its rows"
            )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, num_steps)
        optimizer.step()
        losses.append(loss.item())
        if on_step:
            on_step(step, {job.name: losses[-1]})
    return losses, num_tokens


def _initialise(weights: Mapping[str, Tensor], seed: int) -> None:
    """Draw A uniform in +-1/sqrt(I) in the order of ``TrainedLora``; B is zero already."""
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    for key in sorted((key for key in weights if "lora_A" in key), key=_draw_order):
        bound = 1 / math.sqrt(weights[key].shape[1])
        initial = torch.empty(weights[key].shape).uniform_(-bound, bound, generator=generator)
        weights[key].data.copy_(initial)


def _draw_order(key: str) -> tuple[int, int]:
    """Return a module's sort key: its layer, and its position in the fused projections."""
    layer = re.search(r"\.(\d+)\.", key)
    name = key.split(".")[-3]
    return int(layer[1]) if layer else -1, _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _loss(model: Any, batch: Sequence[TrainExample]) -> Tensor:
    """Compute the mean cross-entropy of the trained tokens."""
    width = max(len(example.token_ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        n = len(example.token_ids)
        ids[row, :n] = torch.tensor(example.token_ids)
        mask[row, :n] = 1
        on = torch.tensor(example.trained)
        labels[row, :n][on] = ids[row, :n][on]
    ids, labels, mask = (x.to(model.device) for x in (ids, labels, mask))
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
