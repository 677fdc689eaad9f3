"""Next-token loss without keeping the logits of all tokens in memory."""

from typing import Any

import torch
from torch import Tensor

from fastsafe.model.transformer import Transformer
from fastsafe_kernels import linear_cross_entropy, token_logprobs
from fastsafe_kernels._spec import INTERPRET

# Most logits in memory at once, in elements: 64 MiB in fp32.
_CHUNK_ELEMENTS = 1 << 24


class _TokenLoss(torch.autograd.Function):
    """Sum of the cross-entropy; its gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: Transformer) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = []
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                loss = -token_logprobs(model.logits(leaf), t).sum()
                gradients.append(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def token_loss(hidden: Tensor, targets: Tensor, model: Transformer) -> Tensor:
    """Sum over rows of -log p(target), in nats.

    Args:
        hidden: [M, E] states after the final norm; differentiable.
        targets: [M] int64 token ids.
        model: Gives the head; it is frozen and gets no gradient.

    Returns:
        Scalar fp32.
    """
    if not hidden.is_cpu or INTERPRET:
        config = model.config
        return linear_cross_entropy(
            hidden,
            model.head,
            targets,
            logits_scale=config.logits_scale,
            softcap=config.logits_softcap or 0.0,
        )
    loss: Tensor = _TokenLoss.apply(hidden, targets, model)  # type: ignore[no-untyped-call]
    return loss
