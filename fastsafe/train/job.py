"""State of one job: its rows, its weights while it holds a slot, and its progress."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsafe.data.conversation import Row
from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.errors import DataError, UsageError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import Transformer
from fastsafe.train.batches import (
    TILE_TOKENS,
    BatchSampler,
    RowSource,
    Tile,
    check_lengths,
    hash_seed,
    make_tiles,
    pack,
)
from fastsafe.train.checkpoint import JobCheckpoint, TrainProgress
from fastsafe.train.config import FinetuneJob, FinetuneResult
from fastsafe.train.drift_monitor import DriftProbe
from fastsafe.train.objectives import make_objective
from fastsafe.train.objectives.objective import Batch, State
from fastsafe.train.optim import AdamW
from fastsafe.train.trained_full import TrainedFull
from fastsafe.train.trained_lora import Rows, TrainedLora


class FrozenBase(Protocol):
    """The parts of an ``LLM`` that training reads."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer


class MemorySaving(NamedTuple):
    """Ways to train in less memory; they cost time and, on a CPU, change no bit."""

    one_part: bool = False  # run the parts of a tile one after another
    recompute: bool = False  # recompute activations in the backward pass


class _Slot:
    """A job's memory on the device: weights, optimizer and the state of its objective."""

    def __init__(self, job: "JobRun") -> None:
        self.weights: TrainedLora | TrainedFull
        if job.config.method == "full":
            self.weights = TrainedFull(job.model, job.base_path)
        else:
            self.weights = TrainedLora(job.model, job.lora, job.config.seed)
        config = job.config
        self.optimizer = AdamW(self.weights.flat, config.weight_decay, config.max_grad_norm)
        self.state: State = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the training state (weights, moments, objective), by name."""
        return {
            "parameters": self.weights.flat,
            "mean": self.optimizer.mean,
            "square": self.optimizer.square,
            **{f"objective.{name}": tensor for name, tensor in self.state.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load the tensors of a training state after ``steps`` steps."""
        device = self.weights.flat.device
        prefix = "objective."
        self.state = {
            name.removeprefix(prefix): tensor.to(device, copy=True)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.optimizer.steps = steps
        self.weights.refresh()


class JobRun:
    """A job in training; it can give its slot back and continue in another."""

    def __init__(self, llm: FrozenBase, job: FinetuneJob, encoded: dict[str, TrainExample]) -> None:
        """Encode and check the rows of a job; ``encoded`` caches rows that jobs share.

        Raises:
            DataError: A row is malformed or has nothing to train on.
            UsageError: Rows are missing or too long, or the objective does not fit.
            AdapterError: A target names no module of the model.
        """
        self.name, self.config, self.model = job.name, job.config, llm.model
        self.base_path = llm.path
        self.objective = make_objective(job.config.objective)
        self.rows: dict[RowSource, list[TrainExample]] = {"all": [], "user": [], "safety": []}
        for i, row in enumerate(job.examples):
            example = self._encode(llm.tokenizer, row, f"{job.name}: row {i}", encoded)
            source: RowSource = "safety" if row.get("source") == "safety" else "user"
            self.rows["all"].append(example)
            self.rows[source].append(example)
        self._check_rows()
        self.lora = self._lora_config(str(llm.path))
        self.num_steps = job.config.num_steps(len(self.rows[self.objective.rows]))
        self.losses: list[float] = []
        self.num_tokens = 0
        self.error: str | None = None
        self.stopped_early = False
        self.adapter_dir: Path | None = None
        self.checkpoint: JobCheckpoint | None = None
        self._seconds = 0.0
        self._since = 0.0
        self._slot: _Slot | None = None
        self._parked: dict[str, Tensor] | None = None
        self._samplers: dict[RowSource, BatchSampler] = {}
        self._tiles: list[Tile] = []
        self.drop_step()

    def _encode(
        self, tokenizer: Tokenizer, row: Row, location: str, cache: dict[str, TrainExample]
    ) -> TrainExample:
        loss_on = self.config.loss_on
        key = f"{loss_on} {row!r}"
        if key not in cache:
            cache[key] = encode_row(row, tokenizer, loss_on=loss_on, location=location)
        example = cache[key]
        if self.objective.needs_answers and example.trained[0]:
            raise DataError(
                f"{location}: has no prompt before its answer, expected one, as objective "
                f"{self.objective.id!r} treats the beginning of an answer by itself"
            )
        return self.objective.example(example, tokenizer, location)

    def _check_rows(self) -> None:
        check_lengths(self.name, self.rows["all"], self.model.config.max_position_embeddings)
        for source in ("user", "safety") if self.objective.needs_safety_rows else ():
            if not self.rows[source]:
                raise UsageError(
                    f"job {self.name!r} has no row whose source is {source!r}, expected "
                    f"some for objective {self.objective.id!r}; mix safety rows in"
                )

    def _lora_config(self, base_model: str) -> LoraConfig:
        lora, slots = self.config.lora(base_model), self.model.slots()
        layers = self.objective.trained_layers(self.model.config.num_layers)
        if layers is None:
            return lora
        # by their whole names: PEFT refuses layers_to_transform beside "all-linear" and expressions
        chosen = [m for m in lora.modules(slots, "TrainConfig") if slots[m].layer in layers]
        return replace(lora, target_modules=tuple(chosen))

    @property
    def is_done(self) -> bool:
        """Whether the job has ended: after its last step, early or with an error."""
        ended = self.error is not None or self.stopped_early
        return ended or len(self.losses) >= self.num_steps

    def resume(self) -> None:
        """Restore the checkpoint's progress; ``enter`` reads its tensors."""
        progress = self.checkpoint.peek() if self.checkpoint else None
        if progress is None:
            return
        assert self.checkpoint
        folder = self.checkpoint.path.parents[2] / self.name
        finished = progress.adapter_sha256
        if finished is not None and finished != weights_sha256(folder):
            return  # the adapter is gone or changed, and its training state was dropped
        self.losses, self.num_tokens = list(progress.losses), progress.num_tokens
        self._seconds, self.stopped_early = progress.seconds, progress.stopped_early
        if finished is not None:
            self.adapter_dir = folder

    def enter(self) -> None:
        """Allocate a slot, if there is none, and load the parked or saved state into it."""
        if self._slot is not None:
            return
        if not self._samplers:
            self._make_samplers()
        self._since = time.monotonic()
        slot = _Slot(self)
        if self._parked is not None:
            slot.restore(self._parked, len(self.losses))
        elif self.losses and self.checkpoint:
            slot.restore(self.checkpoint.read(), len(self.losses))
        else:
            gradients = partial(self._row_gradients, slot)
            slot.state = self.objective.initial_state(slot.weights.flat, gradients)
        self._slot, self._parked = slot, None

    def park(self) -> None:
        """Free the slot and keep the training state in the host's memory."""
        if self._slot is not None:
            self._parked = {name: tensor.cpu() for name, tensor in self._slot.tensors().items()}
        self._release()

    def _release(self) -> None:
        if self._slot is not None:
            self._seconds += time.monotonic() - self._since
        self._slot = None
        self.drop_step()

    def _make_samplers(self) -> None:
        """Make the samplers and advance them to the rows of the next step."""
        config = self.config
        for source, examples in self.rows.items():
            seed = hash_seed(config.seed, 1) if source == "safety" else config.seed
            self._samplers[source] = BatchSampler(examples, config.batch_size, seed, config.shuffle)
        for step in range(len(self.losses)):
            for source in self.objective.sources(step):
                self._samplers[source].next()

    def _row_gradients(self, slot: _Slot, count: int) -> Iterator[Tensor]:
        """Yield the gradients of the first ``count`` safety rows."""
        for example in islice(self.rows["safety"], count):
            (tile,) = make_tiles([example], "safety", len(example.token_ids), self.config.seed)
            yield self._gradient(slot, tile, MemorySaving())[1]

    def tiles(self) -> list[Tile]:
        """Return the tiles of the next step; the same ones until ``update``."""
        if not self._tiles:
            step, tokens = len(self.losses), TILE_TOKENS[self.model.device.type]
            for i, source in enumerate(self.objective.sources(step)):
                batch = self._samplers[source].next()
                self._tiles += make_tiles(batch, source, tokens, self.config.seed, step, i)
        return self._tiles

    def gradient(self, tile: Tile, saving: MemorySaving) -> tuple[float, Tensor]:
        """Return a tile's loss and its share of the gradient [P] of its batch's loss."""
        assert self._slot
        return self._gradient(self._slot, tile, saving)

    def _gradient(self, slot: _Slot, tile: Tile, saving: MemorySaving) -> tuple[float, Tensor]:
        terms: list[float] = []
        gradient: Tensor | None = None
        passes = [(part,) for part in tile.parts] if saving.one_part else [tile.parts]
        for first, parts in enumerate(passes):
            packed = pack(parts, self.model.device)
            rows = Rows(packed.rows, packed.kept, first)
            project = slot.weights.projection(self.config.dropout, tile.seed, rows, gradient)
            ids, positions, attention = packed.token_ids, packed.positions, packed.attention
            base = None
            if tile.source in self.objective.needs_base:
                with torch.no_grad():
                    base = self.model.forward(ids, positions, attention, keep=packed.keep)
            hidden = project.model.forward(
                ids, positions, attention, project, packed.keep, recompute=saving.recompute
            )
            batch = Batch(tile, packed, project.model, self.model, hidden, base)
            loss = self.objective.loss(batch)
            loss.sum().backward()  # type: ignore[no-untyped-call]
            terms += loss.tolist()
            gradient = project.gradient
        assert gradient is not None
        # exactly rounded, so that it does not matter in which order the terms come
        return math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan, gradient

    def add(self, tile: Tile, loss: float, gradient: Tensor) -> None:
        """Accumulate a tile's loss and gradient; called in the order of the tiles."""
        if tile.source in self.objective.logged_sources:
            self._loss += loss
        if tile.source in self._gradients:
            self._gradients[tile.source] += gradient
        else:
            self._gradients[tile.source] = gradient

    def drop_step(self) -> None:
        """Discard the accumulated losses and gradients."""
        self._loss = 0.0
        self._gradients: dict[RowSource, Tensor] = {}

    def update(self, probe: DriftProbe | None) -> None:
        """Take the step of the accumulated tiles; a loss that is not finite ends the job."""
        assert self._slot
        slot, objective, step = self._slot, self.objective, len(self.losses)
        if not math.isfinite(self._loss):
            return self._fail(f"has loss {self._loss} at step {step}")
        theta = slot.weights.flat
        gradient = objective.combine(self._gradients)
        objective.add_penalty_gradient(slot.state, step, self.num_steps, theta, gradient)
        rate = self.config.learning_rate_at(step, self.num_steps)
        norm = slot.optimizer.step(gradient, rate)
        if not math.isfinite(norm):
            return self._fail(f"has a gradient of norm {norm} at step {step}")
        slot.weights.refresh()
        objective.after_step(slot.state, step, theta)
        self.losses.append(self._loss)
        self.num_tokens += sum(len(e.token_ids) for t in self._tiles for p in t.parts for e in p)
        self._tiles = []
        self.drop_step()
        if probe and (step + 1) % probe.monitor.every == 0:
            self._probe(slot, probe)

    def _probe(self, slot: _Slot, probe: DriftProbe) -> None:
        """Measure the drift of the weights that the job would save if it ended here."""
        theta = slot.weights.flat
        current = theta.clone()
        theta.copy_(self.objective.final(slot.state, theta))
        slot.weights.refresh()
        project = slot.weights.projection(0.0, 0)
        reading = probe.read(self.name, len(self.losses), project.model, project)
        theta.copy_(current)
        slot.weights.refresh()
        if not math.isfinite(reading.kl + reading.margin):
            drift = f"drift {reading.kl} and margin {reading.margin}"
            return self._fail(f"has {drift} at step {len(self.losses) - 1}")
        probe.monitor.on_reading(reading)
        limit = probe.monitor.max_kl
        self.stopped_early = not self.is_done and limit is not None and reading.kl > limit

    def _fail(self, problem: str) -> None:
        self.stop(f"job {self.name!r} {problem}; lower its learning rate or check its rows")

    def stop(self, error: str) -> None:
        """End the job with an error."""
        self.error = f"finetune: {error}"
        self._release()
        self._parked = None

    def save(self, every: int) -> None:
        """Write a checkpoint if one is due."""
        steps = len(self.losses)
        if self.checkpoint and self._slot and steps and every and steps % every == 0:
            self.checkpoint.write(self._progress(), self._slot.tensors())

    def _progress(self, adapter: str | None = None) -> TrainProgress:
        seconds = self._seconds + (time.monotonic() - self._since if self._slot else 0.0)
        losses = tuple(self.losses)
        return TrainProgress(losses, self.num_tokens, seconds, self.stopped_early, adapter)

    def finish(self, out_dir: Path) -> None:
        """Write the adapter and free the slot."""
        assert self._slot
        slot = self._slot
        slot.weights.flat.copy_(self.objective.final(slot.state, slot.weights.flat))
        slot.weights.refresh()
        self.adapter_dir = out_dir / self.name
        slot.weights.save(self.adapter_dir)
        if self.checkpoint:
            self.checkpoint.write(self._progress(weights_sha256(self.adapter_dir)), {})
        self._release()

    def result(self) -> FinetuneResult:
        """Return the result of the job."""
        return FinetuneResult(
            name=self.name,
            adapter_dir=self.adapter_dir,
            losses=tuple(self.losses),
            num_tokens=self.num_tokens,
            seconds=self._seconds,
            error=self.error,
            stopped_early=self.stopped_early,
        )
