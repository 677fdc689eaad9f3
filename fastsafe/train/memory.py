"""Predict the memory of training: bytes per adapter and bytes per token.

An adapter in a slot takes its weights, AdamW's two moments, a gradient and the factors as the
products read them. A tile takes, per token, the activations of the backward pass: of every layer
the inputs of norms and linear layers, queries, keys and values, and the gates.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from fastsafe.model.cpu_threads import available_bytes
from fastsafe.model.transformer import Transformer
from fastsafe.train.batches import TILE_TOKENS
from fastsafe.train.config import TrainOptions
from fastsafe.train.job import JobRun
from fastsafe.train.loss import CHUNK_ELEMENTS
from fastsafe.train.trained_full import FullLayout
from fastsafe.train.trained_lora import LoraLayout

# Ranks that vLLM's option max_lora_rank takes (ecosystem notes of 2026).
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)
_FP32 = 4


@dataclass(frozen=True)
class JobMemory:
    """Predicted memory of one job.

    Attributes:
        name: Name of the job.
        rank: Rank of its adapter; 0 for a whole model.
        adapter_bytes: Bytes of its slot.
        gradient_bytes: Bytes of the gradient of each running tile.
        token_bytes: Bytes of each token of a running tile.
        recompute_token_bytes: Likewise when activations are recomputed.
        tile_tokens: Tokens of its largest tile, about.
    """

    name: str
    rank: int
    adapter_bytes: int
    gradient_bytes: int
    token_bytes: int
    recompute_token_bytes: int
    tile_tokens: int

    def tile_bytes(self, recompute: bool) -> int:
        """Return the bytes of its largest tile."""
        per_token = self.recompute_token_bytes if recompute else self.token_bytes
        return self.gradient_bytes + self.tile_tokens * per_token


@dataclass(frozen=True)
class TrainMemory:
    """Predicted memory of a training run.

    Attributes:
        jobs: Memory of each job.
        free_bytes: Memory available beside the base.
        max_jobs: Limit of jobs at once.
        tiles_at_once: Tiles that run at a time, one per thread.
        recompute: Whether activations are recomputed, as a step would not fit otherwise.
    """

    jobs: tuple[JobMemory, ...]
    free_bytes: int
    max_jobs: int
    tiles_at_once: int
    recompute: bool

    def bytes_of(self, names: Collection[str]) -> int:
        """Return the peak bytes of these jobs together."""
        jobs = [job for job in self.jobs if job.name in names]
        tile = max((job.tile_bytes(self.recompute) for job in jobs), default=0)
        return sum(job.adapter_bytes for job in jobs) + self.tiles_at_once * tile

    def fits(self, names: Collection[str]) -> bool:
        """Return whether these jobs fit at once."""
        return self.bytes_of(names) <= self.free_bytes

    @property
    def first_wave(self) -> int:
        """Number of jobs that fit at once, in their order; at least 1."""
        names = [job.name for job in self.jobs]
        limit = min(self.max_jobs, len(names))
        fitting = [n for n in range(1, limit + 1) if self.fits(names[:n])]
        return max(fitting, default=1)

    def describe(self) -> list[str]:
        """Describe the plan in a few lines."""
        if not self.jobs:
            return ["nothing to train"]
        largest = max(self.jobs, key=lambda job: job.adapter_bytes)
        token = max(
            job.recompute_token_bytes if self.recompute else job.token_bytes for job in self.jobs
        )
        kind = f"adapter of rank {largest.rank}" if largest.rank else "whole model"
        at_once = self.first_wave
        first = {job.name for job in self.jobs[:at_once]}
        lines = [
            f"{len(self.jobs)} jobs, {at_once} at once: {_readable(self.bytes_of(first))} of "
            f"{_readable(self.free_bytes)} that are free",
            f"{_readable(largest.adapter_bytes)} per {kind}, "
            f"{_readable(token)} per token of a tile of {largest.tile_tokens}, "
            f"{self.tiles_at_once} tiles at a time",
        ]
        if self.recompute:
            lines.append("activations are computed again in the backward pass, to fit")
        other_ranks = sorted({job.rank for job in self.jobs} - {0, *_VLLM_RANKS})
        if other_ranks:
            lines.append(
                f"rank {', '.join(map(str, other_ranks))}: vLLM takes "
                f"{', '.join(map(str, _VLLM_RANKS))} as its max_lora_rank; set the next one there"
            )
        return lines


def plan_memory(model: Transformer, runs: Sequence[JobRun], options: TrainOptions) -> TrainMemory:
    """Predict the memory of the jobs that ``fastsafe.train.loop.prepare`` has made."""
    jobs = tuple(_job_memory(model, run) for run in runs)
    plan = TrainMemory(
        jobs,
        options.memory_bytes or _free_bytes(model.device),
        len(jobs) if options.max_jobs == "auto" else options.max_jobs,
        torch.get_num_threads() if model.device.type == "cpu" else 1,
        recompute=False,
    )
    each_fits = all(plan.fits([job.name]) for job in jobs)
    return plan if each_fits else replace(plan, recompute=True)


def _job_memory(model: Transformer, run: JobRun) -> JobMemory:
    is_full = run.config.method == "full"
    layout = FullLayout(model) if is_full else LoraLayout(model, run.lora)
    vectors = 4 + run.objective.state_vectors + len(run.objective.sources(0)) - 1
    longest = sorted((len(e.token_ids) - 1 for e in run.rows["all"]), reverse=True)
    batch_tokens = sum(longest[: run.config.batch_size])
    trained_share = sum(sum(e.trained[1:]) for e in run.rows["all"]) / sum(longest)
    token, recompute_bytes = _token_bytes(model, layout, trained_share, run.config.dropout > 0)
    return JobMemory(
        name=run.name,
        rank=0 if is_full else run.config.rank,
        adapter_bytes=_FP32 * (vectors * layout.size + layout.block_size),
        # the gradients of whole weights are leaves of the graph before they are one vector
        gradient_bytes=layout.size * (_FP32 + (model.dtype.itemsize if is_full else 0)),
        token_bytes=token,
        recompute_token_bytes=recompute_bytes,
        tile_tokens=min(batch_tokens, TILE_TOKENS[model.device.type] + longest[0] // 2),
    )


def _token_bytes(
    model: Transformer, layout: LoraLayout | FullLayout, trained_share: float, dropout: bool
) -> tuple[int, int]:
    """Return the bytes per token of a tile: with all activations kept, and with recomputation.

    Args:
        model: The base.
        layout: Layout of the adapter.
        trained_share: Share of tokens that are trained; the end of the last layer runs for these.
        dropout: Whether every module has a masked input of its own.
    """
    config, element = model.config, model.dtype.itemsize
    E, F = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    inputs = {"qkv": E, "o": queries, "gate_up": E, "down": F}
    heads = 2 * config.num_heads * _FP32  # the softmax's maximum and sum

    def linear(layer: int, name: str) -> int:
        if isinstance(layout, FullLayout):
            return inputs[name] * element
        parts = layout.parts.get((layer, name), ())
        if not parts:
            return 0
        masked = len(parts) * inputs[name] * (element + 1) if dropout else 0
        return inputs[name] * element * (not dropout) + masked + parts[-1].r1 * element

    norms = (2 if config.norm_placement == "both" else 1) * (E * element + _FP32)
    # queries, keys and values after the projection, where values stay; rotated again
    attention = (queries + 2 * keys) * element + (queries + keys) * element + heads
    if config.qk_norm is not None:
        attention += (queries + keys) * element
    begins = [(norms if i else 0) + linear(i, "qkv") + attention for i in range(config.num_layers)]
    ends = [
        linear(i, "o") + norms + linear(i, "gate_up") + 2 * F * element + linear(i, "down")
        for i in range(config.num_layers)
    ]
    ends[-1] = int(trained_share * ends[-1])
    rope = len(config.ropes) * 2 * config.head_dim * element
    # states before and after the final norm and their gradient; logits of a chunk, thrice
    logits = min(trained_share * config.vocab_size, CHUNK_ELEMENTS / 640)
    head = trained_share * 3 * E * element + 3 * _FP32 * logits
    gated = (2 * F + E) * element
    final = trained_share * 2 * E * element
    everything = sum(begins) + sum(ends) + rope + final + max(head, gated)
    entering = 2 * E * element * (config.num_layers - 1)
    layer = max(begin + end for begin, end in zip(begins, ends, strict=True))
    layer += 4 * F * element if dropout else 0  # the modules' products, before they are one
    # the head's memory is free when the first layer is recomputed
    return int(everything), int(min(everything, entering + rope + max(layer + gated, head)))


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of the device, with what torch holds of it and does not use."""
    unused = 0
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_bytes(str(device)) + unused


def _readable(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
