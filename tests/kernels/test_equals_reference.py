"""Every kernel equals its reference: forward, backward, every declared point, every dtype.

On a CPU this runs the launchers on their references; with TRITON_INTERPRET=1 the kernel bodies,
interpreted; on a GPU the compiled kernels.
"""

from typing import Any

import pytest
import torch

from fastsafe_kernels._accuracy import accuracy_failures
from fastsafe_kernels._spec import Dims, Kernel, registry

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POINTS = [
    pytest.param(kernel, dims, dtype, id=f"{kernel.name}-{tuple(dims.items())}-{dtype}")
    for kernel in registry().values()
    for dims in kernel.tests
    for dtype in kernel.dtypes
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dims", "dtype"), POINTS)
def test_equals_reference(kernel: Kernel, dims: Dims, dtype: torch.dtype, device: str) -> None:
    """Error against fp64 is at most twice that of plain torch in the same dtype."""
    assert accuracy_failures(kernel, dims, dtype, torch.device(device)) == []


def spoiled(x: torch.Tensor) -> torch.Tensor:
    """Off by 2 %, or by one where values are whole."""
    return 1.02 * x if x.is_floating_point() else x + 1 if x.dtype != torch.bool else ~x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", registry().values(), ids=registry())
def test_the_gate_bites(kernel: Kernel, device: str) -> None:
    """A result off by 2 % is seen in every output, argument written and gradient."""
    results = 0

    def off(*args: Any) -> Any:
        nonlocal results
        y = kernel.fn(*args)
        for i in kernel.mutates:
            args[i].copy_(spoiled(args[i]))
        outputs = y if isinstance(y, tuple) else () if y is None else (y,)
        results = len(outputs)
        return tuple(map(spoiled, outputs))

    off.__name__ = kernel.name
    mutant = Kernel(**{**vars(kernel), "fn": off})
    found = accuracy_failures(mutant, kernel.tests[-1], kernel.dtypes[0], torch.device(device))
    assert len(found) == results + len(kernel.grads) + len(kernel.mutates)
