"""Multiply by a gated unit: gelu(gate) * up, with gelu's tanh approximation.

    y[n, f] = a (1 + tanh(t(a))) / 2 b        with gate a = x[n, f] and b = x[n, F + f]
    t(a) = sqrt(2 / pi) (a + 0.044715 a^3)

Backward, with upstream gradient g and s = sigmoid(2 t(a)) = (1 + tanh(t(a))) / 2:

    dx[n, f] = g b s (1 + 2 a (1 - s) t'(a)),        dx[n, F + f] = g a s

Shapes   x [N, 2F]  ->  y [N, F]
Dtypes   x fp32, bf16 or fp16; y and dx like x; arithmetic fp32, rounded once
Cost     forward reads x and writes y; backward reads g and x and writes dx: nothing else is kept
Source   Hendrycks & Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202
Used by  fastsafe.model (the MLP of Gemma)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _gated
from ._spec import Kernel, runs_reference


def reference(gate_up: Tensor) -> Tensor:
    """Define the op in plain torch, in fp32 inside or in fp64 for fp64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh approximation of gelu.

    Args:
        gate_up: [N, 2F] fp32, bf16 or fp16, contiguous in a row; the gate is the first half of
            the columns. Not modified.

    Returns:
        [N, F] contiguous, dtype of ``gate_up``. Differentiable, once.

    Raises:
        ValueError: ``gate_up`` is not a matrix, has an odd width, or is strided in a row.
        TypeError: Its dtype is not listed above.

    Example:
        >>> geglu(torch.tensor([[0.0, 10.0, 3.0, 3.0]]))
        tensor([[ 0., 30.]])
    """
    _gated.check("geglu", gate_up)
    return reference(gate_up) if runs_reference(gate_up) else _gated.launch(gate_up, gelu=True)


KERNEL = Kernel(
    fn=geglu,
    reference=reference,
    make=_gated.make,
    tests=_gated.TESTS,
    bench=({"N": 1024, "F": 14_336}, {"N": 16_384, "F": 14_336}, {"N": 16_384, "F": 10_240}),
    min_bytes=_gated.min_bytes,
    grads=(0,),
)
