"""All weights of a model while they are trained: flat fp32 state and a differentiable copy.

The counterpart of ``fastsafe.train.lora`` for full fine-tuning. The frozen base is copied once and
never touched, so jobs of both kinds may share it. Gradients go through plain autograd: the small
operations of ``fastsafe.model.layers`` have derivatives in their weights, too.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsafe.errors import UsageError
from fastsafe.io import safetensors
from fastsafe.io.atomic import publish_dir
from fastsafe.io.json_file import read_object
from fastsafe.model.nf4 import NF4Transformer
from fastsafe.model.transformer import Transformer
from fastsafe_kernels import token_logprobs

_MAX_CONFIG_BYTES = 4 << 20
# What a checkpoint needs beside weights and config.json to read and answer.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Most logits in memory at once, in elements: 64 MiB in fp32.
_CHUNK_ELEMENTS = 1 << 24


class TrainedFull:
    """Weights of one model in training, as one flat fp32 vector.

    Attributes:
        flat: [P] fp32, every distinct tensor of the model one after another; a tied head once.
        model: The weights as they are now, in the base's dtype; in fp32 they are views of ``flat``.
    """

    def __init__(self, model: Transformer) -> None:
        """Copy the weights of ``model``, which stays as it is."""
        tensors = model.parameters()
        if isinstance(model, NF4Transformer):
            raise UsageError(
                "finetune: the base is quantized, expected whole weights for full fine-tuning; "
                "load it without quantization or train adapters"
            )
        self.flat = torch.cat([t.detach().flatten().float() for t in tensors])
        self._shapes = [t.shape for t in tensors]
        # in fp32 the optimizer's vector is the weights; else a copy rounds it after each step
        self._working = self.flat if model.dtype is torch.float32 else self.flat.to(model.dtype)
        self._base = model
        self.model = _with(model, self._views(self._working))

    def refresh(self) -> None:
        """Take over the weights as they are now; call it when the flat vector has changed."""
        if self._working is not self.flat:
            self._working.copy_(self.flat)

    def projection(self, dropout: float, seed: int) -> "FullProjection":
        """Differentiable model for one tile, beside which others may run.

        Args:
            dropout: Must be 0: adapters have it, whole models do not.
            seed: Unused, as nothing is random.
        """
        if dropout:
            raise UsageError(
                f"TrainConfig: dropout is {dropout}, expected 0 for full fine-tuning, which has "
                "no adapter to drop inputs of"
            )
        return FullProjection(self._base, self._views(self._working), len(self.flat))

    def save(self, path: str | Path, checkpoint: str | Path) -> None:
        """Write a checkpoint: the weights under their names in the file, and its other files.

        Args:
            path: Folder to write, whole or not at all; what is there is replaced.
            checkpoint: Folder of the base, for its config, tokenizer and chat template.
        """
        source, target = Path(checkpoint), Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        dtype = str(self.model.dtype).removeprefix("torch.")
        config = read_object(source / "config.json", _MAX_CONFIG_BYTES)
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
        with publish_dir(target) as folder:
            for name in _TEXT_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            tensors = {name: t.contiguous() for name, t in self.model.tensors().items()}
            safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat.detach(), [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class FullProjection:
    """``Project`` of one tile, and the model whose embedding, norms and head belong to it.

    Attributes:
        model: To run the tile through.
    """

    def __init__(self, base: Transformer, leaves: list[Tensor], size: int) -> None:
        self._leaves = [leaf.requires_grad_() for leaf in leaves]
        self._size = size
        self.model = _with(base, self._leaves)

    @property
    def gradient(self) -> Tensor:
        """[P] fp32, like the flat vector; complete after the backward pass."""
        found = torch.empty(self._size, dtype=torch.float32, device=self.model.device)
        at = 0
        for leaf in self._leaves:
            own = found[at : at + leaf.numel()].view(leaf.shape)
            at += leaf.numel()
            if leaf.grad is None:  # the tile did not need it
                own.zero_()
            else:
                own.copy_(leaf.grad)
        return found

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by a fused linear in training; see ``Project``."""
        return self.model.linear(layer, name, x)


def _with(model: Transformer, tensors: list[Tensor]) -> Transformer:
    """Make the same model over other tensors, in the order of ``Transformer.parameters``."""
    of = dict(zip(map(id, model.parameters()), tensors, strict=True))
    found = copy.copy(model)
    found.embedding = of[id(model.embedding)]
    found.head = of[id(model.head)]
    found.final_norm = of[id(model.final_norm)]
    found.layers = [
        replace(layer, **{k: of[id(t)] for k, t in vars(layer).items() if t is not None})
        for layer in model.layers
    ]
    return found


class _TokenLoss(torch.autograd.Function):
    """Sum of the cross-entropy; gradients of hidden states and head are made chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, model: Transformer
    ) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS // len(head))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = []
        of_head = torch.zeros_like(head, dtype=torch.float32)
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                loss = -token_logprobs(model.logits(leaf), t).sum()
                dh, dw = torch.autograd.grad(loss, (leaf, model.head))
            total += loss.detach()
            of_hidden.append(dh)
            of_head += dw
        ctx.save_for_backward(torch.cat(of_hidden), of_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        scale = grads[0]
        return of_hidden * scale.to(of_hidden), of_head * scale.to(of_head), None, None


def full_token_loss(hidden: Tensor, targets: Tensor, model: Transformer) -> Tensor:
    """Sum over rows of -log p(target), in nats, differentiable in the head as well.

    Args:
        hidden: [M, E] states after the final norm; differentiable.
        targets: [M] int64 token ids.
        model: Of a ``FullProjection``.

    Returns:
        Scalar fp32.
    """
    loss: Tensor = _TokenLoss.apply(hidden, model.head, targets, model)  # type: ignore[no-untyped-call]
    return loss
