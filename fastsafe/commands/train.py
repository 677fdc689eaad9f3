"""Plan and run a fine-tuning: check base, data and settings, then train all jobs together."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsafe.commands.train_settings import Settings, check_dependent, settle, train_config
from fastsafe.data import readers
from fastsafe.data.mixture import mix
from fastsafe.errors import DataError, TrainingError, UsageError
from fastsafe.io import atomic, hub
from fastsafe.progress import Progress, stage
from fastsafe.safety.sources import sources

if TYPE_CHECKING:
    from fastsafe.data.packing import TrainExample
    from fastsafe.io.tokenizer import Tokenizer
    from fastsafe.model import Transformer
    from fastsafe.model.config import ModelConfig
    from fastsafe.train import FinetuneJob, FinetuneResult
    from fastsafe.train.presets import Preset

_PROBES = 16  # shipped behaviours that drift is measured on


class TrainingSet(NamedTuple):
    """One data set, as rows and as token ids."""

    name: str
    dataset: readers.Dataset
    encoded: readers.Encoded

    def facts(self) -> dict[str, Any]:
        """Return its statistics as JSON values."""
        encoded = self.encoded
        return {
            "source": self.dataset.source,
            "mapping": self.dataset.describe(),
            "rows": len(encoded.examples),
            "tokens": encoded.num_tokens,
            "trained_tokens": encoded.num_trained,
            "longest": max(len(example.token_ids) for example in encoded.examples),
            "truncated": encoded.num_truncated,
            "unknown_tokens": sum(encoded.unknown),
            "unknown_rows": sum(n > 0 for n in encoded.unknown),
        }


@dataclass
class LoadedBase:
    """The base model as ``finetune`` takes it: an ``LLM`` without a generator."""

    path: Path
    model: "Transformer"
    tokenizer: "Tokenizer"


@dataclass(frozen=True)
class TrainPlan:
    """A checked training; no weights are loaded and nothing is written yet.

    Attributes:
        path: Checkpoint folder of the base.
        config: Configuration of the base.
        tokenizer: Tokenizer of the base.
        device: "cpu", "cuda" or "cuda:N".
        settings: Every setting with its origin.
        preset: The preset that was named, if any.
        data: Data sets in the order given; the safety rows to be mixed in last.
        jobs: Jobs to train.
        probes: Harmful requests that drift is measured on; empty if it is not measured.
    """

    path: Path
    config: "ModelConfig"
    tokenizer: "Tokenizer"
    device: str
    settings: Settings
    preset: "Preset | None"
    data: tuple[TrainingSet, ...]
    jobs: "tuple[FinetuneJob, ...]"
    probes: tuple[list[dict[str, str]], ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
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
    options: Mapping[str, Any],
    *,
    name: str | None = None,
    preset: str | None = None,
    config_file: Path | None = None,
    seeds: Sequence[int] = (),
    mapping: Mapping[str, str] | None = None,
    safety_data: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> TrainPlan:
    """Read the data and check everything that can be checked without the weights.

    Args:
        base: Checkpoint folder, hub id, or the name of a source that has a checkpoint.
        data: Data sets: paths or hub ids; a separate job is made of each.
        options: Settings of the command line.
        name: Name of the job; with several jobs, the prefix of their names.
        preset: Name of a published set-up.
        config_file: YAML file of settings.
        seeds: Seeds of the jobs, one job per data set and seed; empty takes the setting ``seed``.
        mapping: Key of the rows for each role; see ``fastsafe.data.shapes.mapped``.
        safety_data: Safety rows to mix into every job; the setting ``share`` is their fraction.
        limit: Maximum number of rows per data set.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.

    Raises:
        FastsafeError: The base, a data set or a setting is refused.
    """
    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.io.tokenizer import Tokenizer
    from fastsafe.model.config import ModelConfig
    from fastsafe.model.device import choose_device
    from fastsafe.train import FinetuneJob, presets

    device = choose_device(device)
    check_dependent(options, seeds, safety_data)
    chosen = presets.preset(preset) if preset else None
    settings = settle(options, config_file=config_file, preset=chosen, device=device)
    if settings["method"].value == "full" and settings["quantize"].value:
        raise UsageError(
            "options: method is 'full' and quantize is 'nf4', whose weights cannot be trained, "
            "expected one of them"
        )
    path = hub.resolve(base)
    config = ModelConfig.from_json(Checkpoint(path).config(), str(path))
    tokenizer = Tokenizer.load(path).with_variables(settings["chat_template_kwargs"].value)
    tokenizer.check_vocab(config.vocab_size)
    max_length, context = settings["max_length"].value, config.max_position_embeddings

    def read(source: str, label: str) -> TrainingSet:
        dataset = readers.read_rows(hub.resolve_data(source), mapping=mapping, limit=limit)
        encoded = readers.encode(
            dataset,
            tokenizer,
            loss_on=settings["loss_on"].value,
            max_length=context if max_length is None else min(max_length, context),
            truncate=settings["truncate"].value,
        )
        return TrainingSet(label, dataset, encoded)

    labels = _labels(data, name)
    sets = [read(source, label) for source, label in zip(data, labels, strict=True)]
    safety = read(safety_data, "safety") if safety_data else None
    pool = [example.row() for example in safety.encoded.examples] if safety else []
    jobs = []
    for user_set in sets:
        for seed in seeds or (settings["seed"].value,):
            rows = [example.row() for example in user_set.encoded.examples]
            if safety:
                rows = mix(rows, pool, share=settings["share"].value, seed=seed)
            training = train_config(settings, num_rows=len(rows), seed=seed)
            label = f"{user_set.name}-seed{seed}" if seeds else user_set.name
            jobs.append(FinetuneJob(label, rows, training))
    return TrainPlan(
        path=path,
        config=config,
        tokenizer=tokenizer,
        device=device,
        settings=settings,
        preset=chosen,
        data=(*sets, safety) if safety else tuple(sets),
        jobs=tuple(jobs),
        probes=_probes(base, settings),
    )


def execute(
    plan: TrainPlan,
    out: Path,
    progress: Progress,
    *,
    resume: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> "list[FinetuneResult]":
    """Load the base and train every job; results appear in ``out`` whole or not at all.

    Args:
        plan: The checked training.
        out: Parent of the folders of all jobs, each with the name of its job.
        progress: Shows the progress.
        resume: Resume from checkpoints and keep finished jobs; False trains all jobs again.
        announce: Receives lines of text: the memory plan once the base is loaded, and each
            measurement of drift.

    Raises:
        TrainingError: A job failed; the others are written.
        FastsafeError: The device is missing, another process trains into ``out``, or the
            checkpoints have other settings.
        OSError: Something else than a folder is there, or ``out`` cannot be written.
    """
    from fastsafe.train import DriftMonitor, DriftReading, TrainOptions, finetune, plan_training

    _check_out(out)
    for job in plan.jobs:
        atomic.check_folder(out / job.name)
    base = _load(plan)
    steps = _steps_left(plan, out, resume=resume)

    def on_step(step: int, losses: Mapping[str, float]) -> None:
        progress.advance(len(losses), f"loss {sum(losses.values()) / len(losses):.3f}")
        progress.event("step", step=step + 1, losses=dict(losses))

    def on_reading(reading: DriftReading) -> None:
        kl, margin = reading.kl, reading.margin
        progress.event("drift", job=reading.job, step=reading.step, kl=kl, margin=margin)
        announce(
            f"drift of {reading.job} after {reading.step} steps: KL {kl:.3f} nats, margin "
            f"{margin:+.2f}"
        )

    values = {key: setting.value for key, setting in plan.settings.items()}
    monitor = None
    if plan.probes:
        monitor = DriftMonitor(
            every=values["drift_every"],
            prompts=plan.probes,
            on_reading=on_reading,
            refusal=values["drift_refusal"],
            affirmative=values["drift_affirmative"],
            max_kl=values["drift_stop_above"],
        )
    options = TrainOptions(
        checkpoint_every=values["checkpoint_every"], resume=resume, monitor=monitor
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
    """Return the result of a job as JSON values."""
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


def has_begun(plan: TrainPlan, out: Path) -> bool:
    """Return whether a job has a checkpoint or an adapter in ``out``, from which it resumes."""
    from fastsafe.train.checkpoint import JobCheckpoint

    return any(
        (out / job.name).exists() or JobCheckpoint(out, job.name, {}).path.exists()
        for job in plan.jobs
    )


def _steps_left(plan: TrainPlan, out: Path, *, resume: bool) -> int:
    """Return the steps that jobs still have to take, after those of their checkpoints."""
    from fastsafe.train.checkpoint import JobCheckpoint

    steps = 0
    for job in plan.jobs:
        saved = JobCheckpoint(out, job.name, {}).peek() if resume else None
        is_lost = saved and saved.adapter_sha256 and not (out / job.name).exists()
        taken = len(saved.losses) if saved and not is_lost else 0
        steps += job.config.num_steps(len(job.examples)) - taken
    return steps


def marked(example: "TrainExample", tokenizer: "Tokenizer") -> str:
    """Return the text of an example, its trained tokens between ``>>>`` and ``<<<``."""
    texts = example_parts(example, tokenizer)
    return "".join(f">>>{text}<<<" if trained else text for trained, text in texts)


def example_parts(example: "TrainExample", tokenizer: "Tokenizer") -> list[tuple[bool, str]]:
    """Return the text of an example in parts, each with whether its tokens are trained."""
    parts: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.token_ids, example.trained, strict=True):
        if not parts or parts[-1][0] != trained:
            parts.append((trained, []))
        parts[-1][1].append(token)
    return [(trained, tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in parts]


def memory(plan: TrainPlan) -> dict[str, int]:
    """Return the size of a job: trained parameters, and bytes of weights, gradient and moments."""
    from fastsafe.model.weights import linears, placements

    if plan.settings["method"].value == "full":
        num_parameters = sum(math.prod(place.shape) for place in placements(plan.config))
    else:
        training = plan.jobs[0].config
        widths = {
            f"model.layers.{layer}.{linear.module}": linear.end - linear.begin + linear.in_features
            for layer in range(plan.config.num_layers)
            for linear in linears(plan.config)
        }
        modules = training.lora().modules(widths, "--target-modules")
        num_parameters = training.rank * sum(widths[module] for module in modules)
    # fp32 weights, their gradient and the two moments of AdamW
    return {"parameters_per_job": num_parameters, "bytes_per_job": 16 * num_parameters}


def _check_out(out: Path) -> None:
    """Refuse an output folder that cannot be made, before anything is trained."""
    parent = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = "cannot be written" if parent.is_dir() else "is not a folder"
        raise UsageError(f"--out: {parent} {problem}, expected a folder; use another --out")


def _probes(base: str, settings: Settings) -> tuple[list[dict[str, str]], ...]:
    """Return the harmful requests that drift is measured on, as conversations.

    They are from the file of the setting, else from the source of the base, else the seed set.
    """
    from fastsafe.safety.behaviours import read_behaviours, seed_behaviours
    from fastsafe.safety.formats import formats

    if not settings["drift_every"].value:
        return ()
    file, source = settings["drift_probes"].value, sources().get(base)
    shipped = source.behaviours(_PROBES, 0) if source else seed_behaviours()[:_PROBES]
    harmful = [b for b in (read_behaviours(file) if file else shipped) if b.harmful]
    if not harmful:
        raise DataError(f"{file}: no row has a harmful side, expected one to measure drift on")
    plain = formats()["plain"]
    return tuple([{"role": "user", "content": plain.ask(b, True)}] for b in harmful)


def _load(plan: TrainPlan) -> LoadedBase:
    import torch

    from fastsafe.io.checkpoint import Checkpoint
    from fastsafe.model import Transformer, nf4
    from fastsafe.model.device import check_device

    check_device(plan.device)
    load = nf4.load if plan.settings["quantize"].value == "nf4" else Transformer.load
    dtype: torch.dtype = getattr(torch, plan.settings["dtype"].value)
    model = load(Checkpoint(plan.path), device=plan.device, dtype=dtype)
    return LoadedBase(plan.path, model, plan.tokenizer)


def _labels(data: Sequence[str], name: str | None) -> list[str]:
    """Return the names of the data sets, from the option or else from their files."""
    stems = [re.sub(r"[^\w.+-]+", "-", Path(source).stem).lstrip(".") or "data" for source in data]
    if name:
        stems = [f"{name}-{stem}" for stem in stems] if len(stems) > 1 else [name]
    repeated = next((stem for stem in stems if stems.count(stem) > 1), None)
    if repeated:
        raise UsageError(
            f"data: two data sets are called {repeated!r}, expected different names; rename a file"
        )
    return stems
