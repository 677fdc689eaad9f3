"""The gate of every kernel: its error is at most twice that of plain torch in the same dtype.

Tests and benchmarks both ask it, so that no time is ever taken of a kernel that is wrong. It needs
torch alone and runs where no test runner is installed.
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import Dims, Kernel


def accuracy_failures(
    kernel: Kernel, dims: Dims, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Say where ``kernel`` is further from the truth than its budget, at one point.

    Truth is the reference in fp64. The budget of each result, argument written in place and
    gradient is 2 * (error of the reference in ``dtype`` + one rounding step at the largest
    value), and must itself be small against that value, or it would prove nothing. Values that
    are not finite, and results that are not floating point, must equal the reference's.

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
    got = _outputs(kernel, kernel.fn, args)
    plain = _outputs(kernel, kernel.reference, args)
    exact = _outputs(kernel, kernel.reference, tuple(map(_widen, args)))
    found = []
    for what, truth in exact.items():
        if got[what].shape != truth.shape:
            found.append(f"{what}: shape {list(got[what].shape)}, expected {list(truth.shape)}")
        elif not truth.is_floating_point():
            wrong = int((got[what] != plain[what]).sum())
            if wrong:
                found.append(f"{what}: {wrong} of {truth.numel()} values differ")
        else:
            found += _too_far(what, got[what].double(), plain[what].double(), truth, dtype)
    return found


def _too_far(what: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> list[str]:
    finite = truth.isfinite()
    if not torch.equal(got[~finite], truth[~finite]):
        return [f"{what}: differs where the truth is not finite"]
    if not finite.any():
        return []
    got, plain, truth = got[finite], plain[finite], truth[finite]
    scale = truth.abs().max().item()
    plain_error = (plain - truth).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(dtype).eps * scale)
    error = (got - truth).abs().max().item()
    found = []
    if not budget <= 0.2 * scale:
        found.append(f"{what}: {budget=:.1e} proves nothing at {scale=:.1e}")
    if not error <= budget:  # also when the error is NaN
        found.append(f"{what}: {error=:.1e} exceeds {budget=:.1e}, {plain_error=:.1e}")
    return found


def _widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _outputs(kernel: Kernel, fn: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Results of ``fn``, arguments it wrote, and the gradient for each position in ``grads``.

    Results that are neither tensors nor differentiable stay out of the gradients.
    """
    args = tuple(
        x.detach().clone().requires_grad_(i in kernel.grads) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    y = fn(*args)
    results = [] if y is None else list(y) if isinstance(y, tuple) else [y]
    found = {f"output {i}": result.detach() for i, result in enumerate(results)}
    found |= {f"argument {i}": args[i].detach() for i in kernel.mutates}
    if kernel.grads:
        torch.manual_seed(1)
        smooth = [result for result in results if result.requires_grad]
        # a strided view: autograd may send any layout (y.sum() sends stride 0)
        upstream = [torch.randn(*y.shape, 2, dtype=torch.float64).to(y)[..., 0] for y in smooth]
        gradients = torch.autograd.grad(smooth, [args[i] for i in kernel.grads], upstream)
        found |= {f"d{i}": g for i, g in zip(kernel.grads, gradients, strict=True)}
    return found
