"""What ``fastsafe train`` does: read and check base, data and settings, then run the jobs."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsafe.commands.train_settings import Settings, settle, train_config
from fastsafe.data import readers
from fastsafe.data.mixture import mix
from fastsafe.errors import DataError, TrainingError, UsageError
from fastsafe.progress import Progress, stage
from fastsafe.safety.sources import Source as World
from fastsafe.safety.sources import sources

if TYPE_CHECKING:
    from fastsafe.data.packing import Example
    from fastsafe.io.tokenizer import Tokenizer
    from fastsafe.model import Transformer
    from fastsafe.model.config import ModelConfig
    from fastsafe.train import FinetuneJob, FinetuneResult, TrainConfig
    from fastsafe.train.presets import Preset

_PROBES = 16  # shipped behaviours that drift is read on


class Source(NamedTuple):
    """One data set and what the model will see of it."""

    name: str
    dataset: readers.Dataset
    encoded: readers.Encoded

    def facts(self) -> dict[str, Any]:
        """Return what was found, as JSON values."""
        seen = self.encoded
        return {
            "source": self.dataset.source,
            "mapping": self.dataset.describe(),
            "rows": len(seen.examples),
            "tokens": seen.num_tokens,
            "trained_tokens": seen.num_trained,
            "longest": max(len(example.token_ids) for example in seen.examples),
            "truncated": seen.num_truncated,
        }


@dataclass
class Base:
    """The model that is tuned, as ``finetune`` takes it."""

    path: Path
    model: "Transformer"
    tokenizer: "Tokenizer"


@dataclass(frozen=True)
class Plan:
    """A checked run; nothing is loaded to the device or written yet.

    Attributes:
        path: Checkpoint folder of the base.
        config: Of the base.
        tokenizer: Of the base.
        device: "cpu" or "cuda".
        settings: Every setting with its origin.
        preset: The one that was asked for.
        data: Data sets in the order given; safety rows that are mixed in last.
        jobs: What is trained.
        probes: Harmful requests that drift is read on; empty where none is.
    """

    path: Path
    config: "ModelConfig"
    tokenizer: "Tokenizer"
    device: str
    settings: Settings
    preset: "Preset | None"
    data: tuple[Source, ...]
    jobs: "tuple[FinetuneJob, ...]"
    probes: tuple[list[dict[str, str]], ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return what will be done, as JSON values."""
        jobs = [
            {
                "name": job.name,
                "rows": len(job.examples),
                "steps": job.config.num_steps(len(job.examples)),
                "warmup_steps": job.config.warmup_steps,
                "seed": job.config.seed,
            }
            for job in self.jobs
        ]
        return {
            "base": str(self.path),
            "device": self.device,
            "preset": list(self.preset.lines()) if self.preset else [],
            "settings": {key: setting._asdict() for key, setting in self.settings.items()},
            "data": [source.facts() for source in self.data],
            "jobs": jobs,
            "memory": memory(self),
        }


def plan(
    base: str,
    data: Sequence[str],
    given: Mapping[str, Any],
    *,
    name: str | None = None,
    preset: str | None = None,
    config_file: Path | None = None,
    seeds: Sequence[int] = (),
    mapping: Mapping[str, str] | None = None,
    safety_data: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> Plan:
    """Read and check everything that can be checked without the weights.

    Args:
        base: Checkpoint folder, hub id, or the name of a source that has a checkpoint.
        data: Data sets: paths or hub ids. Each is a job of its own.
        given: Settings of the command line.
        name: Of the job; of several jobs the beginning of their names.
        preset: Name of a published set-up.
        config_file: YAML file of settings.
        seeds: One job per data set and seed; the setting ``seed`` when empty.
        mapping: What the values of the rows are; see ``fastsafe.data.shapes.mapped``.
        safety_data: Data set that makes up the setting ``share`` of every job's rows.
        limit: Most rows per data set.
        device: "cpu" or "cuda".

    Raises:
        FastsafeError: The base, a data set or a setting does not check.
    """
    from fastsafe.io import hub
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.io.tokenizer import Tokenizer
    from fastsafe.model.config import ModelConfig
    from fastsafe.train import FinetuneJob, presets

    _check_alone(given, seeds, safety_data)
    chosen = presets.preset(preset) if preset else None
    settings = settle(given, config_file=config_file, preset=chosen, device=device)
    if settings["method"].value == "full" and settings["quantize"].value:
        raise UsageError(
            "options: method is 'full' and quantize is 'nf4', whose weights cannot be trained, "
            "expected one of them"
        )
    world = sources().get(base)
    path = (world.checkpoint() if world else None) or hub.resolve(base)
    config = ModelConfig.from_json(Checkpoint(path).config(), str(path))
    tokenizer = Tokenizer.load(path)
    tokenizer.check_vocab(config.vocab_size)
    longest, most = settings["max_length"].value, config.max_position_embeddings

    def read(source: str, label: str) -> Source:
        dataset = readers.read_rows(hub.resolve_data(source), mapping=mapping, limit=limit)
        encoded = readers.encode(
            dataset,
            tokenizer,
            loss_on=settings["loss_on"].value,
            max_length=most if longest is None else min(longest, most),
            truncate=settings["truncate"].value,
        )
        return Source(label, dataset, encoded)

    labels = _labels(data, name)
    found = [read(each, label) for each, label in zip(data, labels, strict=True)]
    safety = read(safety_data, "safety") if safety_data else None
    pool = [example.row() for example in safety.encoded.examples] if safety else []
    jobs = []
    for source in found:
        for seed in seeds or (settings["seed"].value,):
            rows = [example.row() for example in source.encoded.examples]
            if safety:
                rows = mix(rows, pool, share=settings["share"].value, seed=seed)
            training = train_config(settings, num_rows=len(rows), seed=seed)
            label = f"{source.name}-seed{seed}" if seeds else source.name
            jobs.append(FinetuneJob(label, rows, training))
    all_data = (*found, safety) if safety else tuple(found)
    probes = _probes(world, settings)
    return Plan(path, config, tokenizer, device, settings, chosen, all_data, tuple(jobs), probes)


def execute(
    plan: Plan,
    out: Path,
    progress: Progress,
    *,
    resume: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> "list[FinetuneResult]":
    """Load the base and train every job; what is trained appears in ``out`` whole or not at all.

    Args:
        plan: What to do.
        out: Each job is written to ``out/<its name>``.
        progress: Where to show it.
        resume: Whether to go on from checkpoints and leave jobs alone that are done; else all are
            trained again.
        announce: Told what memory it will take, a line at a time, once the base is loaded, and
            every reading of drift.

    Raises:
        TrainingError: A job could not go on; the others are written.
        FastsafeError: The device is absent, or the checkpoints are of other settings.
    """
    from fastsafe.train import DriftMonitor, DriftReading, TrainOptions, finetune, plan_training

    _check_out(out)
    base = _load(plan)
    steps = sum(job.config.num_steps(len(job.examples)) for job in plan.jobs)

    def on_step(step: int, losses: Mapping[str, float]) -> None:
        progress.advance(len(losses), f"loss {sum(losses.values()) / len(losses):.3f}")
        progress.event("step", step=step + 1, losses=dict(losses))

    def on_reading(reading: DriftReading) -> None:
        kl, margin = reading.kl, reading.margin
        progress.event("drift", job=reading.job, step=reading.step, kl=kl, margin=margin)
        shown = f"KL {kl:.3f} nats, margin {margin:+.2f}"
        announce(f"drift of {reading.job} after {reading.step} steps: {shown}")

    told = {key: setting.value for key, setting in plan.settings.items()}
    monitor = None
    if plan.probes:
        monitor = DriftMonitor(
            every=told["drift_every"],
            prompts=plan.probes,
            on_reading=on_reading,
            refusal=told["drift_refusal"],
            affirmative=told["drift_affirmative"],
            max_kl=told["drift_stop_above"],
        )
    options = TrainOptions(
        checkpoint_every=told["checkpoint_every"], resume=resume, monitor=monitor
    )
    for line in plan_training(base, plan.jobs, options).describe():
        announce(f"memory: {line}")
    progress.event("run_started", out=str(out), jobs=[job.name for job in plan.jobs])
    with stage(progress, "train", steps, "steps"):
        results = finetune(base, plan.jobs, out, on_step, options=options)
    progress.event("run_finished", results=[summary(result) for result in results])
    errors = [result.error for result in results if result.error is not None]
    if errors:
        raise TrainingError(errors[0])
    return results


def summary(result: "FinetuneResult") -> dict[str, Any]:
    """Return what came of a job, as JSON values."""
    return {
        "name": result.name,
        "path": str(result.adapter_dir) if result.adapter_dir else None,
        "steps": result.steps,
        "tokens": result.num_tokens,
        "first_loss": result.losses[0] if result.losses else None,
        "last_loss": result.losses[-1] if result.losses else None,
        "stopped_early": result.stopped_early,
        "error": result.error,
    }


def marked(example: "Example", tokenizer: "Tokenizer") -> str:
    """Return a row as the model sees it, what is trained between ``>>>`` and ``<<<``."""
    parts: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.token_ids, example.trained, strict=True):
        if not parts or parts[-1][0] != trained:
            parts.append((trained, []))
        parts[-1][1].append(token)
    texts = [(trained, tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in parts]
    return "".join(f">>>{text}<<<" if trained else text for trained, text in texts)


def memory(plan: Plan) -> dict[str, int]:
    """Return what a job keeps: fp32 weights, their gradient and both means of AdamW, in bytes."""
    from fastsafe.model.weights import placements

    if plan.settings["method"].value == "full":
        size = sum(math.prod(place.shape) for place in placements(plan.config))
    else:
        size = _adapter_parameters(plan.config, plan.jobs[0].config)
    return {"parameters_per_job": size, "bytes_per_job": 16 * size}


def _adapter_parameters(config: "ModelConfig", training: "TrainConfig") -> int:
    from fastsafe.model.peft import LoraConfig
    from fastsafe.model.weights import linears

    widths = {
        f"model.layers.{layer}.{each.module}": each.end - each.begin + each.in_features
        for layer in range(config.num_layers)
        for each in linears(config)
    }
    targets = training.target_modules
    lora = LoraConfig(
        rank=training.rank,
        alpha=training.alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
    )
    return training.rank * sum(widths[m] for m in lora.modules(widths, "--target-modules"))


def _check_alone(given: Mapping[str, Any], seeds: Sequence[int], safety_data: str | None) -> None:
    """Refuse options that would change nothing without another one."""
    for key, value in given.items():
        option = "--safety-data" if key == "share" else "--drift-every"
        is_set = safety_data if key == "share" else given.get("drift_every")
        if (key == "share" or key.startswith("drift_")) and value and not is_set:
            raise UsageError(f"--{key.replace('_', '-')}: expected {option} with it")
    if seeds and given.get("seed") is not None:
        raise UsageError("--seeds: --seed is set, too, expected one of them")


def _check_out(out: Path) -> None:
    """Refuse a place where no folder can be made, before anything is trained."""
    first = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not first.is_dir() or not os.access(first, os.W_OK):
        why = "cannot be written" if first.is_dir() else "is no folder"
        raise UsageError(f"--out: {first} {why}, expected a folder; use another --out")


def _probes(world: World | None, settings: Settings) -> tuple[list[dict[str, str]], ...]:
    """Harmful requests as they are asked: those of a file, the model's own, or the seed set's."""
    from fastsafe.safety.behaviours import read_behaviours, seed_behaviours
    from fastsafe.safety.formats import formats

    if not settings["drift_every"].value:
        return ()
    file = settings["drift_probes"].value
    shipped = world.behaviours(_PROBES, 0) if world else seed_behaviours()[:_PROBES]
    harmful = [each for each in (read_behaviours(file) if file else shipped) if each.harmful]
    if not harmful:
        raise DataError(f"{file}: no row has a harmful side, expected one to read the drift on")
    plain = formats()["plain"]
    return tuple([{"role": "user", "content": plain.ask(each, True)}] for each in harmful)


def _load(plan: Plan) -> Base:
    import torch

    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model import Transformer, nf4

    if plan.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device: it is {plan.device}, but torch finds no CUDA device; use cpu")
    load = nf4.load if plan.settings["quantize"].value == "nf4" else Transformer.load
    dtype: torch.dtype = getattr(torch, plan.settings["dtype"].value)
    model = load(Checkpoint(plan.path), device=plan.device, dtype=dtype)
    return Base(plan.path, model, plan.tokenizer)


def _labels(data: Sequence[str], name: str | None) -> list[str]:
    """Names of the data sets: of their files, or as they are asked for."""
    stems = [re.sub(r"[^\w.+-]+", "-", Path(each).stem).lstrip(".") or "data" for each in data]
    if name:
        stems = [f"{name}-{stem}" for stem in stems] if len(stems) > 1 else [name]
    repeated = next((stem for stem in stems if stems.count(stem) > 1), None)
    if repeated:
        raise UsageError(
            f"data: two data sets are called {repeated!r}, expected a name each; rename a file"
        )
    return stems
