"""The gate of every kernel: its error is at most twice that of plain torch in the same dtype.

Tests and benchmarks both ask it, so that no time is ever taken of a kernel that is wrong. It needs
torch alone and runs where no test runner is installed.
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import Dims, Kernel


def failures(kernel: Kernel, dims: Dims, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Say where ``kernel`` is further from the truth than its budget, at one point.

    Truth is the reference in fp64. The budget of the output and of each gradient is
    2 * (error of the reference in ``dtype`` + one rounding step at the largest value), and must
    itself be small against that value, or it would prove nothing.

    Args:
        kernel: The op.
        dims: Point to try it at; seeds are fixed.
        dtype: Of the floating arguments.
        device: Where to run it.

    Returns:
        One sentence per broken budget; empty when the kernel is right.
    """
    torch.manual_seed(0)
    args = kernel.make(dims, dtype, device)
    got = _outputs(kernel.fn, args, kernel.grads)
    plain = _outputs(kernel.reference, args, kernel.grads)
    exact = _outputs(kernel.reference, tuple(map(_widen, args)), kernel.grads)
    found = []
    for what, truth in exact.items():
        scale = truth.abs().max().item()
        plain_error = (plain[what] - truth).abs().max().item()
        budget = 2 * (plain_error + torch.finfo(dtype).eps * scale)
        error = (got[what] - truth).abs().max().item()
        if not budget <= 0.2 * scale:
            found.append(f"{what}: {budget=:.1e} proves nothing at {scale=:.1e}")
        if not error <= budget:  # also when the error is NaN
            found.append(f"{what}: {error=:.1e} exceeds {budget=:.1e}, {plain_error=:.1e}")
    return found


def _widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _outputs(fn: Any, args: tuple[Any, ...], grads: tuple[int, ...]) -> dict[str, Tensor]:
    """Result of ``fn`` and its gradient for each position in ``grads``, in fp64."""
    args = tuple(
        x.detach().requires_grad_(i in grads) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    y = fn(*args)
    found = {"output": y.detach().double()}
    if grads:
        torch.manual_seed(1)
        # a strided view: autograd may send any layout (y.sum() sends stride 0)
        upstream = torch.randn(*y.shape, 2, dtype=torch.float64).to(y)[..., 0]
        gradients = torch.autograd.grad(y, [args[i] for i in grads], upstream)
        found |= {f"d{i}": g.double() for i, g in zip(grads, gradients, strict=True)}
    return found
