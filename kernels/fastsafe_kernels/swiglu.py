"""Multiply by a gated unit: silu(gate) * up.

    y[n, f] = a sigmoid(a) b        with gate a = x[n, f] and b = x[n, F + f]

Backward, with upstream gradient g and s = sigmoid(a):

    dx[n, f] = g b s (1 + a (1 - s)),        dx[n, F + f] = g a s

Shapes   x [N, 2F]  ->  y [N, F]
Dtypes   x fp32, bf16 or fp16; y and dx like x; arithmetic fp32, rounded once
Cost     forward reads x and writes y; backward reads g and x and writes dx: nothing else is kept
Source   Shazeer 2020, arXiv:2002.05202 (without its matrices)
Used by  fastsafe.model (the MLP of Llama, Qwen, Mistral and Phi)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _gated
from ._spec import Kernel, runs_reference


def reference(gate_up: Tensor) -> Tensor:
    """Define the op in plain torch, in fp32 inside or in fp64 for fp64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [N, 2F] fp32, bf16 or fp16, contiguous in a row; the gate is the first half of
            the columns. Not modified.

    Returns:
        [N, F] contiguous, dtype of ``gate_up``. Differentiable, once.

    Raises:
        ValueError: ``gate_up`` is not a matrix, has an odd width, or is strided in a row.
        TypeError: Its dtype is not listed above.

    Example:
        >>> swiglu(torch.tensor([[0.0, 10.0, 3.0, 3.0]]))
        tensor([[ 0.0000, 29.9986]])
    """
    _gated.check("swiglu", gate_up)
    return reference(gate_up) if runs_reference(gate_up) else _gated.launch(gate_up, gelu=False)


KERNEL = Kernel(
    fn=swiglu,
    reference=reference,
    make=_gated.make,
    tests=_gated.TESTS,
    bench=({"N": 1024, "F": 14_336}, {"N": 16_384, "F": 14_336}, {"N": 16_384, "F": 9728}),
    min_bytes=_gated.min_bytes,
    grads=(0,),
)
