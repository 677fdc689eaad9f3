"""The training loop: any number of adapters on one frozen base, a step of each in turn.

Every job's batch is cut into tiles of whole sequences, packed without padding. A tile runs in one
thread; tiles of all jobs fill the cores. A job's gradient is the sum over its own tiles in their
order, so training it among others gives the same bits as training it alone.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsafe.data.packing import Example, encode_row
from fastsafe.errors import TrainingError, UsageError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model.attention import PackedAttention
from fastsafe.model.parallel import tile_runner
from fastsafe.model.peft import LoraConfig
from fastsafe.model.transformer import Transformer
from fastsafe.train.config import FinetuneJob, FinetuneResult, TrainConfig
from fastsafe.train.lora import TrainedLora
from fastsafe.train.loss import token_loss
from fastsafe.train.optim import AdamW

# Tokens of a tile. Smaller ones stay in a core's L2 cache, but their many short operations queue
# for the interpreter's lock: 640 took 15 % less time than 320. A GPU wants few large launches.
_TILE_TOKENS = {"cpu": 640, "cuda": 16384}


class FrozenBase(Protocol):
    """What training needs of an LLM."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer


class _Tile(NamedTuple):
    """Whole sequences of one job's batch, packed."""

    job: int
    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    attention: PackedAttention
    keep: Tensor  # [M] rows whose next token is trained
    targets: Tensor  # [M] int64
    dropout_seed: int


def finetune(
    llm: FrozenBase,
    jobs: Sequence[FinetuneJob],
    out_dir: str | Path,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> list[FinetuneResult]:
    """Train one LoRA adapter per job, all on the same frozen base.

    Args:
        llm: The base: an ``LLM``, or anything with its path, model and tokenizer.
        jobs: What to train; names are unique and name directories.
        out_dir: Each adapter is written to ``out_dir/<job name>`` in PEFT's layout, when all
            jobs are done.
        on_step: Called after every step with its index and the loss of each job that took it.

    Returns:
        One result per job, in order.

    Raises:
        UsageError: Names clash or cannot be directory names.
        DataError: A row is malformed or has nothing to train on.
        TrainingError: A loss is not finite.
    """
    names = [job.name for job in jobs]
    for name in names:
        if not re.fullmatch(r"[\w+-][\w.+-]{0,127}", name) or names.count(name) > 1:
            raise UsageError(
                f"finetune: job name {name!r} cannot name a directory of its own; use each once, "
                "of at most 128 letters, digits and . _ + - with no dot first"
            )
    encoded: dict[str, Example] = {}
    states = [_Job(llm, job, encoded) for job in jobs]
    num_steps = max((state.num_steps for state in states), default=0)
    with tile_runner(llm.model.device) as runner:
        for step in range(num_steps):
            active = [i for i, state in enumerate(states) if step < state.num_steps]
            tiles = [tile for i in active for tile in states[i].tiles(i, step)]
            results = list(runner.map(lambda tile: states[tile.job].gradient(tile), tiles))
            for i in active:
                own = [r for tile, r in zip(tiles, results, strict=True) if tile.job == i]
                states[i].update(step, own)
            if on_step:
                on_step(step, {names[i]: states[i].losses[-1] for i in active})
    return [state.result(Path(out_dir)) for state in states]


class _Job:
    def __init__(self, llm: FrozenBase, job: FinetuneJob, encoded: dict[str, Example]) -> None:
        """Prepare a job; ``encoded`` holds rows of the jobs before it, as they often share them."""
        config = job.config
        self.name = job.name
        self.config: TrainConfig = config
        self.model = llm.model
        self.examples: list[Example] = []
        for i, row in enumerate(job.examples):
            key = f"{config.loss_on} {row!r}"
            if key not in encoded:
                encoded[key] = encode_row(
                    row, llm.tokenizer, loss_on=config.loss_on, where=f"{job.name}: row {i}"
                )
            self.examples.append(encoded[key])
        if not self.examples:
            raise UsageError(f"finetune: job {job.name!r} has no rows")
        longest = max(len(e.token_ids) for e in self.examples)
        most = self.model.config.max_position_embeddings
        if longest > most:
            raise UsageError(
                f"finetune: job {job.name!r} has a row of {longest} tokens, the model takes {most}"
            )
        targets = config.target_modules
        lora = LoraConfig(
            rank=config.rank,
            alpha=config.alpha,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            dropout=config.dropout,
            base_model=str(llm.path),
        )
        self.lora = TrainedLora(self.model, lora, config.seed)
        self.optimizer = AdamW(self.lora.flat, config.weight_decay, config.max_grad_norm)
        self.num_steps = config.num_steps(len(self.examples))
        self.losses: list[float] = []
        self.num_tokens = 0
        self._batches = self._batch_order()

    def _batch_order(self) -> Iterator[list[Example]]:
        """Batches without end; every epoch is a permutation of all rows."""
        order = list(range(len(self.examples)))
        generator = random.Random(self.config.seed)
        while True:
            if self.config.shuffle:
                generator.shuffle(order)
            for start in range(0, len(order), self.config.batch_size):
                yield [self.examples[i] for i in order[start : start + self.config.batch_size]]

    def tiles(self, job: int, step: int) -> list[_Tile]:
        """Cut the next batch into tiles of about equal size."""
        batch = sorted(next(self._batches), key=lambda e: len(e.token_ids))
        total = sum(len(e.token_ids) for e in batch)
        self.num_tokens += total
        # the first token of a sequence is no target: nothing comes before it
        self._trained = sum(sum(e.trained[1:]) for e in batch)
        count = math.ceil(total / _TILE_TOKENS[self.model.device.type])
        groups: list[list[Example]] = [[] for _ in range(count)]
        done = 0
        for example in batch:
            groups[min(count - 1, done * count // total)].append(example)
            done += len(example.token_ids)
        return [
            self._tile(job, group, hash_seed(self.config.seed, step, i))
            for i, group in enumerate(group for group in groups if group)
        ]

    def _tile(self, job: int, examples: Sequence[Example], dropout_seed: int) -> _Tile:
        # the last token of a sequence predicts nothing
        lengths = [len(e.token_ids) - 1 for e in examples]
        tokens = [t for e in examples for t in e.token_ids[:-1]]
        next_tokens = [t for e in examples for t in e.token_ids[1:]]
        keep = [i for i, on in enumerate(t for e in examples for t in e.trained[1:]) if on]
        device = self.model.device
        return _Tile(
            job,
            torch.tensor(tokens, device=device),
            torch.cat([torch.arange(n) for n in lengths]).to(device),
            PackedAttention(lengths),
            torch.tensor(keep, device=device),
            torch.tensor([next_tokens[i] for i in keep], device=device),
            dropout_seed,
        )

    def gradient(self, tile: _Tile) -> tuple[float, Tensor]:
        """Loss of a tile and its share of the gradient of the batch's mean loss."""
        project = self.lora.projection(self.config.dropout, tile.dropout_seed)
        hidden = self.model.forward(
            tile.token_ids, tile.positions, tile.attention, project, tile.keep
        )
        loss = token_loss(hidden, tile.targets, self.model) / self._trained
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), project.gradient

    def update(self, step: int, results: Sequence[tuple[float, Tensor]]) -> None:
        """Sum the tiles' gradients in their order, clip, and take an optimizer step."""
        loss = sum(value for value, _ in results)
        if not math.isfinite(loss):
            raise TrainingError(
                f"finetune: job {self.name!r} has loss {loss} at step {step}; "
                "lower its learning rate or check its rows"
            )
        gradient = results[0][1]
        for _, more in results[1:]:
            gradient += more
        norm = self.optimizer.step(gradient, self.config.learning_rate_at(step, self.num_steps))
        if not math.isfinite(norm):
            raise TrainingError(
                f"finetune: job {self.name!r} has a gradient of norm {norm} at step {step}; "
                "lower its learning rate or check its rows"
            )
        self.lora.refresh()
        self.losses.append(loss)

    def result(self, out_dir: Path) -> FinetuneResult:
        """Write the adapter and report."""
        folder = out_dir / self.name
        self.lora.adapter(self.name).save(folder)
        return FinetuneResult(
            name=self.name,
            adapter_dir=folder,
            losses=tuple(self.losses),
            num_tokens=self.num_tokens,
        )


def hash_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part (FNV-1a, Fowler et al. 1991)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in (part & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 1
