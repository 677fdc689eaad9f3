"""AdamW over one flat buffer per adapter."""

import torch
from torch import Tensor

import fastsafe_kernels as ops


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Parameters and state are flat fp32 vectors, so that a step is one call for a whole adapter. The
    arithmetic is that of ``torch.optim.AdamW`` with its default betas and eps, after
    ``torch.nn.utils.clip_grad_norm_``.
    """

    def __init__(self, parameters: Tensor, weight_decay: float, max_grad_norm: float) -> None:
        """Allocate state for ``parameters`` [P] fp32; ``max_grad_norm`` 0 means no clipping."""
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.mean = torch.zeros_like(parameters)
        self.square = torch.zeros_like(parameters)
        self.steps = 0
        self._length = torch.tensor([len(parameters)], device=parameters.device)

    def step(self, gradient: Tensor, learning_rate: float) -> float:
        """Apply one update from ``gradient`` [P] fp32, which is not modified.

        Returns:
            The L2 norm of the gradient. If it is not finite, neither are the parameters now.
        """
        self.steps += 1
        device = gradient.device
        norms = ops.adamw(
            self.parameters[None],
            gradient[None],
            self.mean[None],
            self.square[None],
            torch.tensor([learning_rate], dtype=torch.float64, device=device),
            torch.tensor([self.steps], device=device),
            self._length,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
        return norms.item()
