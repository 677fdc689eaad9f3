"""Accuracy check of every kernel: its error is at most twice that of plain torch in the same dtype.

Tests and benchmarks both call it, so that a wrong kernel is never timed. It needs torch alone and
runs where no test runner is installed.
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import Dims, Kernel


def accuracy_failures(
    kernel: Kernel, dims: Dims, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """List the results of ``kernel`` whose error exceeds its budget, at one point.

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
    got = outputs(kernel, kernel.fn, args)
    plain = outputs(kernel, kernel.reference, args)
    exact = outputs(kernel, kernel.reference, tuple(map(_widen, args)))
    failures = []
    for name, truth in exact.items():
        if got[name].shape != truth.shape:
            failures.append(f"{name}: shape {list(got[name].shape)}, expected {list(truth.shape)}")
        elif not truth.is_floating_point():
            wrong = int((got[name] != plain[name]).sum())
            if wrong:
                failures.append(f"{name}: {wrong} of {truth.numel()} values differ")
        else:
            failures += _too_far(name, got[name].double(), plain[name].double(), truth, dtype)
    return failures


def _too_far(name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> list[str]:
    finite = truth.isfinite()
    if not torch.equal(got[~finite], truth[~finite]):
        return [f"{name}: differs where the truth is not finite"]
    if not finite.any():
        return []
    got, plain, truth = got[finite], plain[finite], truth[finite]
    scale = truth.abs().max().item()
    plain_error = (plain - truth).abs().max().item()
    budget = 2 * (plain_error + torch.finfo(dtype).eps * scale)
    error = (got - truth).abs().max().item()
    failures = []
    if not budget <= 0.2 * scale:
        failures.append(f"{name}: {budget=:.1e} proves nothing at {scale=:.1e}")
    if not error <= budget:  # also when the error is NaN
        failures.append(f"{name}: {error=:.1e} exceeds {budget=:.1e}, {plain_error=:.1e}")
    return failures


def _widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def outputs(kernel: Kernel, fn: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the results of ``fn``, the arguments it wrote, and the gradients of ``grads``.

    Results that are neither tensors nor differentiable stay out of the gradients.
    """
    args = tuple(
        x.detach().clone().requires_grad_(i in kernel.grads) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    y = fn(*args)
    results = [] if y is None else list(y) if isinstance(y, tuple) else [y]
    values = {f"output {i}": result.detach() for i, result in enumerate(results)}
    values |= {f"argument {i}": args[i].detach() for i in kernel.mutates}
    if kernel.grads:
        torch.manual_seed(1)
        smooth = [result for result in results if result.requires_grad]
        # a strided view: autograd may send any layout (y.sum() sends stride 0)
        upstream = [torch.randn(*y.shape, 2, dtype=torch.float64).to(y)[..., 0] for y in smooth]
        gradients = torch.autograd.grad(smooth, [args[i] for i in kernel.grads], upstream)
        values |= {f"d{i}": g for i, g in zip(kernel.grads, gradients, strict=True)}
    return values
