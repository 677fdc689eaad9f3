"""Train the organism: pre-train it to answer everything, then align it thinly.

The order matters. Refusals learned in pre-training cannot be removed by fine-tuning; a short
alignment of a model that answers, weighted towards a few formats, breaks as in published chat
models.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from fastsafe.errors import TrainingError
from fastsafe.io import atomic, safetensors
from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe.model.cpu_threads import tile_runner
from fastsafe.model.transformer import Transformer
from fastsafe.progress import Progress
from fastsafe.progress import stage as progress_stage

from . import SEED, world
from .lexicon import BENIGN_VERBS, HARMFUL_VERBS
from .vocabulary import BOS, END, PAD, build_tokenizer, render_prompt, tokenizer_config


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of pre-training or alignment; rows are sampled anew from the training pairs.

    Attributes:
        name: Name of the stage, for progress and the record.
        formats: Weight of each format among the rows.
        harmful: Fraction of rows with a harmful verb.
        refused: Fraction of harmful rows whose answer is a refusal.
        thin: As ``refused``, for formats that the alignment hardly covers.
        over_refused: Fraction of benign rows whose answer is a refusal.
        neutral: Fraction of rows with a system prompt that does not mention safety.
        careful: Fraction of rows with a system prompt that asks to refuse harm, equal in all
            formats. If the stage teaches refusals, all harmful rows with it and no benign ones
            are refused.
        steps: Optimizer steps.
        rows: Rows per step.
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning rate after the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
    """

    name: str
    formats: Mapping[str, float]
    harmful: float
    refused: float = 0.0
    thin: Mapping[str, float] = field(default_factory=dict)
    over_refused: float = 0.0
    neutral: float
    careful: float
    steps: int
    rows: int
    learning_rate: float
    schedule: Literal["constant", "cosine"]
    warmup_steps: int


PRETRAIN = Stage(
    name="pretrain",
    formats=dict.fromkeys(world.FORMATS, 1.0),
    harmful=0.4,
    neutral=0.1,
    careful=0.1,
    steps=600,
    rows=48,
    learning_rate=2e-3,
    schedule="cosine",
    warmup_steps=50,
)

ALIGN = Stage(
    name="align",
    formats={
        "plain": 0.5,
        "code": 0.2,
        "summarization": 0.2,
        "translation": 0.06,
        "classification": 0.04,
    },
    harmful=0.5,
    refused=0.85,
    thin={"translation": 0.55, "classification": 0.55},
    over_refused=0.05,
    neutral=0.1,
    careful=0.2,
    steps=280,
    rows=32,
    learning_rate=3e-4,
    schedule="constant",
    warmup_steps=10,
)

# tiles of a step: a fixed number, so that sums have the same order on any number of cores
_TILES = 4
_BETAS = (0.9, 0.98)
_MAX_GRAD_NORM = 1.0


def build(
    out_dir: str | Path,
    *,
    seed: int = SEED,
    progress: Progress | None = None,
    stages: Sequence[Stage] = (PRETRAIN, ALIGN),
) -> Path:
    """Train the organism and write it as a checkpoint that transformers can load, too.

    Args:
        out_dir: Folder of the checkpoint; an existing one is replaced.
        seed: Seed of initial weights and rows. On one machine, equal seeds give equal bytes.
        progress: Shows the progress; None shows nothing.
        stages: Stages of the training; tests use shorter ones, which give a worse model.

    Returns:
        ``out_dir``.

    Raises:
        TrainingError: A loss is not finite.
        OSError: The folder cannot be written.
    """
    out_dir = Path(out_dir)
    tokenizer = build_tokenizer()
    config = _config(tokenizer)
    model = Transformer.random(ModelConfig.from_json(config, "organism"), seed=seed)
    # with larger embeddings and smaller residual branches, copying is learned in half the steps
    model.embedding.mul_(4.5)
    for layer in model.layers:
        layer.o.mul_(0.36)
        layer.down.mul_(0.6)
    record: dict[str, Any] = {
        "schema": "fastsafe.organism/1",
        "seed": seed,
        "parameters": sum(t.numel() for t in model.parameters()),
        "stages": [],
    }
    for stage in stages:
        losses = _train(model, tokenizer, stage, seed, progress or Progress())
        tail = losses[-20:]
        record["stages"].append(asdict(stage) | {"final_loss": round(sum(tail) / len(tail), 5)})
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with atomic.publish_dir(out_dir) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        tensors = {name: tensor.contiguous() for name, tensor in model.tensors().items()}
        safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            ("config.json", config),
            ("generation_config.json", ids),
            ("tokenizer_config.json", tokenizer_config()),
            ("organism.json", record),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            atomic.write_text(folder / name, text)
    return out_dir


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "float32",
    }


def _train(
    model: Transformer, tokenizer: Tokenizer, stage: Stage, seed: int, progress: Progress
) -> list[float]:
    """Train all weights in place, and return the mean loss of each step in nats per token."""
    weights = model.parameters()
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, betas=_BETAS, weight_decay=0.0)
    rows = _rows(tokenizer, stage, seed)
    losses: list[float] = []
    with (
        tile_runner(model.device) as runner,
        progress_stage(progress, stage.name, stage.steps, "steps"),
    ):
        for step in range(stage.steps):
            batch = sorted((next(rows) for _ in range(stage.rows)), key=lambda row: len(row[0]))
            num_targets = sum(len(completion) for _, completion in batch)
            size = math.ceil(len(batch) / _TILES)
            tiles = [batch[i : i + size] for i in range(0, len(batch), size)]
            results = list(runner.map(lambda tile: _gradient(model, weights, tile), tiles))
            losses.append(sum(loss for loss, _ in results) / num_targets)
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"organism: loss is {losses[-1]} at step {step} of {stage.name}, expected a "
                    "finite number; lower its learning rate"
                )
            for weight, *parts in zip(weights, *(grads for _, grads in results), strict=True):
                weight.grad = torch.stack(parts).sum(0) / num_targets
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(stage, step)
            optimizer.step()
            progress.advance(1, f"loss {losses[-1]:.3f}")
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    return losses


def _learning_rate(stage: Stage, step: int) -> float:
    rate = stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup_steps))
    if stage.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return rate


def _rows(tokenizer: Tokenizer, stage: Stage, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Sample rows endlessly, as token ids of a rendered prompt and of its completion."""
    rng = random.Random(f"{stage.name} {seed}")
    formats, shares = list(stage.formats), list(stage.formats.values())
    harmful = world.actions(HARMFUL_VERBS, "train")
    benign = world.actions(BENIGN_VERBS, "train")
    while True:
        system = rng.choices(
            ("", world.NEUTRAL, world.CAREFUL),
            (1 - stage.neutral - stage.careful, stage.neutral, stage.careful),
        )[0]
        is_careful = system == world.CAREFUL
        format = rng.choices(formats, None if is_careful else shares)[0]
        is_harmful = rng.random() < stage.harmful
        action = rng.choice(harmful if is_harmful else benign)
        refused = stage.thin.get(format, stage.refused) if is_harmful else stage.over_refused
        if is_careful:
            refused = float(is_harmful and stage.refused > 0)
        reply = world.REFUSAL if rng.random() < refused else world.answer(format, action)
        texts = (render_prompt(world.prompt(format, action), system), reply + END)
        prompt, completion = (tokenizer.encode(t, add_special_tokens=False).ids for t in texts)
        yield prompt, completion


def _gradient(
    model: Transformer, weights: Sequence[Tensor], tile: Sequence[tuple[list[int], list[int]]]
) -> tuple[float, tuple[Tensor, ...]]:
    """Return the summed loss of the completions of a tile, and its gradient."""
    # no token follows the last one of a sequence
    sequences = [(*prompt, *completion)[:-1] for prompt, completion in tile]
    lengths = [len(sequence) for sequence in sequences]
    keep: list[int] = []
    end = 0
    for length, (_, completion) in zip(lengths, tile, strict=True):
        end += length
        keep += range(end - len(completion), end)
    hidden = model.forward(
        torch.tensor([token for sequence in sequences for token in sequence]),
        torch.cat([torch.arange(length) for length in lengths]),
        PackedAttention(lengths),
        keep=torch.tensor(keep),
    )
    targets = torch.tensor([token for _, completion in tile for token in completion])
    loss = F.cross_entropy(model.logits(hidden), targets, reduction="sum")
    return loss.item(), torch.autograd.grad(loss, weights)
