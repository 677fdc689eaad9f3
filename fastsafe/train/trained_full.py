"""The weights of a whole model in training: flat fp32 state and a differentiable copy.

The counterpart of ``fastsafe.train.trained_lora`` for full fine-tuning. The frozen base is copied
once and never touched, so jobs of both kinds may share it. Gradients go through plain autograd: the
small operations of ``fastsafe.model.layers`` have derivatives in their weights, too.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastsafe.errors import UsageError
from fastsafe.io import safetensors
from fastsafe.io.atomic import publish_dir
from fastsafe.io.checkpoint import MAX_CONFIG_BYTES
from fastsafe.io.json_file import read_object
from fastsafe.model.nf4 import NF4Transformer
from fastsafe.model.transformer import Transformer

# Files of a checkpoint, beside weights and config.json, that encoding and generating need.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class FullLayout:
    """Sizes of a whole model in training; the counterpart of ``LoraLayout``.

    Attributes:
        size: P, number of weights.
        block_size: fp32 elements of the copy in the base's dtype.
    """

    def __init__(self, model: Transformer) -> None:
        self.size = sum(tensor.numel() for tensor in model.parameters())
        is_fp32 = model.dtype is torch.float32
        self.block_size = 0 if is_fp32 else self.size * model.dtype.itemsize // 4


class TrainedFull:
    """Weights of one model in training, as one flat fp32 vector.

    Attributes:
        flat: [P] fp32, every distinct tensor of the model one after another; a tied head once.
        model: The present weights in the base's dtype; in fp32 they are views of ``flat``.
    """

    def __init__(self, model: Transformer, checkpoint: Path) -> None:
        """Copy the weights of ``model``, which stays as it is.

        Args:
            model: The base.
            checkpoint: Its folder, for config, tokenizer and chat template of what is saved.

        Raises:
            UsageError: The base is quantized.
        """
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
        self._checkpoint = checkpoint
        self.model = _with_tensors(model, self._views(self._working))

    def refresh(self) -> None:
        """Copy the flat vector into the model; call it when the vector has changed."""
        if self._working is not self.flat:
            self._working.copy_(self.flat)

    def projection(
        self,
        dropout: float = 0.0,
        seed: int = 0,
        rows: object = None,
        gradient: Tensor | None = None,
    ) -> "FullProjection":
        """Make a differentiable model for one tile; several may exist at once.

        Args:
            dropout: Unused: ``TrainConfig`` refuses it for full fine-tuning. It, ``seed`` and
                ``rows`` are parameters of ``TrainedLora.projection``.
            seed: Unused.
            rows: Unused.
            gradient: [P] fp32 of earlier parts of the tile, to add to; None begins with zeros.
        """
        if gradient is None:
            gradient = torch.zeros_like(self.flat)
        return FullProjection(self._base, self._views(self._working), gradient)

    def save(self, folder: Path) -> None:
        """Write a checkpoint: the present weights, and the other files of the base's checkpoint.

        Args:
            folder: Written whole or not at all; an older one is replaced.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        dtype = str(self.model.dtype).removeprefix("torch.")
        config = read_object(self._checkpoint / "config.json", MAX_CONFIG_BYTES)
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
        with publish_dir(folder) as target:
            for name in _TEXT_FILES:
                if (self._checkpoint / name).is_file():
                    shutil.copyfile(self._checkpoint / name, target / name)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            tensors = {name: t.contiguous() for name, t in self.model.tensors().items()}
            safetensors.write(target / "model.safetensors", tensors, {"format": "pt"})

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat.detach(), [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class FullProjection:
    """``Project`` of one tile, and the model whose embedding, norms and head belong to it.

    Attributes:
        model: To run the tile through; its weights are leaves of the graph.
    """

    def __init__(self, base: Transformer, leaves: list[Tensor], gradient: Tensor) -> None:
        self._leaves = [leaf.requires_grad_() for leaf in leaves]
        self._gradient = gradient
        self.model = _with_tensors(base, self._leaves)

    @property
    def gradient(self) -> Tensor:
        """[P] fp32, like the flat vector; complete after the backward pass."""
        at = 0
        for leaf in self._leaves:
            if leaf.grad is not None:  # None where the tile did not use the tensor
                self._gradient[at : at + leaf.numel()] += leaf.grad.flatten()
                leaf.grad = None
            at += leaf.numel()
        return self._gradient

    def __call__(self, layer: int, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply by a fused linear in training; see ``Project``."""
        return self.model.linear(layer, name, x)


def _with_tensors(model: Transformer, tensors: list[Tensor]) -> Transformer:
    """Copy a model with other tensors, given in the order of ``Transformer.parameters``."""
    new = dict(zip(map(id, model.parameters()), tensors, strict=True))
    copied = copy.copy(model)
    copied.embedding = new[id(model.embedding)]
    copied.head = new[id(model.head)]
    copied.final_norm = new[id(model.final_norm)]
    copied.layers = [
        replace(layer, **{k: new[id(t)] for k, t in vars(layer).items() if t is not None})
        for layer in model.layers
    ]
    return copied
