"""Every kernel equals its reference: forward, backward, every declared point, every dtype.

On a CPU this runs the launchers on their references; with TRITON_INTERPRET=1 the kernel bodies,
interpreted; on a GPU the compiled kernels.
"""

import pytest
import torch

from fastsafe_kernels._gate import failures
from fastsafe_kernels._spec import Dims, Kernel, registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POINTS = [
    pytest.param(kernel, dims, dtype, id=f"{kernel.name}-{tuple(dims.items())}-{name}")
    for kernel in registry().values()
    for dims in kernel.tests
    for name, dtype in DTYPES.items()
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dims", "dtype"), POINTS)
def test_equals_reference(kernel: Kernel, dims: Dims, dtype: torch.dtype, device: str) -> None:
    """Error against fp64 is at most twice that of plain torch in the same dtype."""
    assert failures(kernel, dims, dtype, torch.device(device)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", registry().values(), ids=registry())
def test_the_gate_bites(kernel: Kernel, device: str) -> None:
    """A result off by 2 % is seen in the output and in every gradient."""

    def off(*args: object) -> torch.Tensor:
        return 1.02 * kernel.fn(*args)

    off.__name__ = kernel.name
    mutant = Kernel(**{**vars(kernel), "fn": off})
    found = failures(mutant, kernel.tests[-1], torch.float32, torch.device(device))
    assert len(found) == 1 + len(kernel.grads)
