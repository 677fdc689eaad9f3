"""Losses of the trained tokens, computed without holding all their logits in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastsafe.model.transformer import Transformer
from fastsafe_kernels import linear_cross_entropy, linear_logprobs, token_logprobs
from fastsafe_kernels._spec import INTERPRET

# Most logits in memory at once, in elements: 64 MiB in fp32.
CHUNK_ELEMENTS = 1 << 24

_LossOfLogits = Callable[[Tensor, slice], Tensor]  # logits [m, V] of these rows -> losses [m]


class _Chunked(torch.autograd.Function):
    """Losses of logits, chunk by chunk; the forward pass already takes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, model: Transformer, losses: _LossOfLogits) -> Tensor:
        chunks, gradients = [], []
        for rows in _chunks(hidden, model):
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_()
                loss = losses(model.logits(leaf), rows)
                gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
            chunks.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype)[:, None], None, None


def through_head(hidden: Tensor, model: Transformer, losses: _LossOfLogits) -> Tensor:
    """Apply ``losses`` to the logits of ``hidden`` [M, E] in chunks of rows -> [M] fp32.

    A head that requires a gradient gets it; its logits are then computed twice.
    """
    if not len(hidden):
        return hidden.sum(1).float()  # no loss, but still a node of the graph
    if model.head.requires_grad:
        return torch.cat(
            [
                checkpoint(
                    lambda h, r: losses(model.logits(h), r), hidden[r], r, use_reentrant=False
                )
                for r in _chunks(hidden, model)
            ]
        )
    y: Tensor = _Chunked.apply(hidden, model, losses)  # type: ignore[no-untyped-call]
    return y


def token_loss(
    hidden: Tensor, targets: Tensor, model: Transformer, weights: Tensor | None = None
) -> Tensor:
    """Compute -log p(target) of every row, in nats, times its weight.

    Args:
        hidden: [M, E] states after the final norm; differentiable.
        targets: [M] int64 token ids.
        model: Its head is used.
        weights: [M] fp32; None is 1 everywhere. Gets no gradient.

    Returns:
        fp32: one loss per row where logits are chunked, [M], or their sum from the fused op, [1].
    """
    if _fuses(hidden, model):
        return _fused(hidden, targets, model, weights)[None]

    def losses(logits: Tensor, rows: slice) -> Tensor:
        loss = -token_logprobs(logits, targets[rows])
        return loss if weights is None else loss * weights[rows]

    return through_head(hidden, model, losses)


def divergence(hidden: Tensor, base: Tensor, model: Transformer, base_model: Transformer) -> Tensor:
    """Compute KL(q || p) of the next token, in nats, with q of ``base`` and p of ``hidden``.

    Args:
        hidden: [M, E] states after the final norm; differentiable.
        base: [M, E] states of the base.
        model: Its head is used for ``hidden``.
        base_model: Its head is used for ``base``; the same one where heads are frozen.

    Returns:
        fp32, [M] or their sum [1], as ``token_loss``.
    """
    if _fuses(hidden, model):
        no_weight = torch.zeros(len(hidden), device=hidden.device)
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return _fused(hidden, targets, model, no_weight, base)[None]

    def losses(logits: Tensor, rows: slice) -> Tensor:
        log_q = base_model.logits(base[rows]).log_softmax(-1)
        return (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1)

    return through_head(hidden, model, losses)


@torch.no_grad()
def target_logprobs(hidden: Tensor, targets: Tensor, model: Transformer) -> Tensor:
    """Compute log p(target) of every row, [M] fp32, without a gradient."""
    if not len(hidden):
        return hidden.new_zeros(0, dtype=torch.float32)
    if _fuses(hidden, model):
        config = model.config
        return linear_logprobs(
            hidden, model.head, targets, config.logits_scale, config.logits_softcap or 0.0
        )
    chunks = _chunks(hidden, model)
    return torch.cat([token_logprobs(model.logits(hidden[r]), targets[r]) for r in chunks])


def _fuses(hidden: Tensor, model: Transformer) -> bool:
    """Return whether the fused ops compute the loss; they give the head no gradient."""
    return (not hidden.is_cpu or INTERPRET) and not model.head.requires_grad


def _fused(
    hidden: Tensor,
    targets: Tensor,
    model: Transformer,
    weights: Tensor | None,
    base: Tensor | None = None,
) -> Tensor:
    config = model.config
    return linear_cross_entropy(
        hidden,
        model.head,
        targets,
        weights,
        base,
        logits_scale=config.logits_scale,
        softcap=config.logits_softcap or 0.0,
    )


def _chunks(hidden: Tensor, model: Transformer) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    return [slice(i, i + size) for i in range(0, len(hidden), size)]
