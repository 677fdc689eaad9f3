"""AdamW over one flat buffer per adapter."""

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's defaults


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Parameters and state are flat fp32 vectors, so that a step is a handful of vector operations
    for a whole adapter. The arithmetic is that of ``torch.optim.AdamW``.
    """

    def __init__(self, parameters: Tensor, weight_decay: float) -> None:
        """Optimize ``parameters`` [P] fp32 in place."""
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.mean = torch.zeros_like(parameters)
        self.square = torch.zeros_like(parameters)
        self.steps = 0

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Apply one update; ``gradient`` [P] fp32 is not modified."""
        self.steps += 1
        self.parameters.mul_(1 - learning_rate * self.weight_decay)
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        correction = (1 - BETA2**self.steps) ** 0.5
        denominator = (self.square.sqrt() / correction).add_(EPS)
        step_size = learning_rate / (1 - BETA1**self.steps)
        self.parameters.addcdiv_(self.mean, denominator, value=-step_size)


def clip(gradient: Tensor, max_norm: float) -> float:
    """Scale ``gradient`` [P] in place to an L2 norm of at most ``max_norm``; 0 means never.

    Returns:
        The norm before.
    """
    norm = torch.linalg.vector_norm(gradient)
    if max_norm > 0:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
