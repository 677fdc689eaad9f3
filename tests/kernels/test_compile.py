"""Every kernel compiles for three GPU generations on a machine that has none."""

from pathlib import Path

import pytest

from fastsafe_kernels._spec import INTERPRET, Kernel, registry
from fastsafe_testing.compile_checks import SHARED_BYTES, Launch, assert_compiles, launches

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")

POINTS = [
    pytest.param(
        kernel,
        launch,
        capability,
        id=f"{kernel.name}{launch.function.__name__}-{i}-sm{capability}",
    )
    for kernel in registry().values()
    for i, launch in enumerate([] if INTERPRET else launches(kernel))
    for capability in SHARED_BYTES
]


@pytest.mark.parametrize(("kernel", "launch", "capability"), POINTS)
def test_compiles(kernel: Kernel, launch: Launch, capability: int, tmp_path: Path) -> None:
    assert_compiles(kernel, launch, capability, tmp_path)


def test_every_kernel_launches_something() -> None:
    """The recorder sees forward and backward of each op, or the test above proves nothing."""
    for kernel in registry().values():
        names = {launch.function.__name__ for launch in launches(kernel)}
        assert len(names) >= (2 if kernel.grads else 1), kernel.name
