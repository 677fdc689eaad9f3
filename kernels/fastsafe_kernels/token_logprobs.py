"""Log-probability of one chosen token per row.

    y[n] = z[n, t[n]] - lse[n],        lse[n] = log sum_v exp z[n, v]

Backward, with upstream gradient g:

    dz[n, v] = g[n] * ([v = t[n]] - exp(z[n, v] - lse[n]))

Shapes   z [N, V], t [N]  ->  y [N]
Dtypes   z fp32, bf16 or fp16; t int64; lse, y and every sum fp32; dz like z
Cost     forward reads z once; backward reads it once more and writes dz
Source   Milakov & Gimelshein 2018, arXiv:1805.02867 (their m, d are our m, s)
Used by  fastsafe.engine (logprobs of sampled tokens), fastsafe.train (token loss)
"""

from typing import Any

import torch
from torch import Tensor

from ._spec import FLOATS, Dims, Kernel, match, runs_reference
from ._triton import tl, triton

# One row per program, swept in blocks. The order of the sum depends on V alone, so a row
# gives the same bits in any batch.
BLOCK = 4096


def reference(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Define the op in plain torch, in the dtype of ``logits``."""
    return logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


@triton.jit
def _forward_kernel(z_ptr, t_ptr, y_ptr, lse_ptr, z_stride, V, BLOCK: tl.constexpr):
    # int64: N * V passes 2**31 at 16k tokens of a 150k vocabulary
    n = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + n * z_stride
    m = -float("inf")
    s = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        # a block that is all -inf (banned tokens) must not compute -inf - -inf
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(z - shift), 0)
        m = m_new
    lse = m + tl.log(s)
    chosen = tl.load(row_ptr + tl.load(t_ptr + n)).to(tl.float32)
    tl.store(lse_ptr + n, lse)
    tl.store(y_ptr + n, chosen - lse)


@triton.jit
def _backward_kernel(
    g_ptr, z_ptr, t_ptr, lse_ptr, dz_ptr, z_stride, dz_stride, V, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = v < V
    z = tl.load(z_ptr + n * z_stride + v, mask=keep, other=-float("inf")).to(tl.float32)
    p = tl.exp(z - tl.load(lse_ptr + n))
    hit = (v == tl.load(t_ptr + n)).to(tl.float32)
    dz = tl.load(g_ptr + n) * (hit - p)
    tl.store(dz_ptr + n * dz_stride + v, dz.to(dz_ptr.dtype.element_ty), mask=keep)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor) -> Tensor:
        N, V = z.shape
        y = torch.empty(N, dtype=torch.float32, device=z.device)
        lse = torch.empty_like(y)
        if N:
            _forward_kernel[(N,)](z, t, y, lse, z.stride(0), V, BLOCK=BLOCK)
        ctx.save_for_backward(z, t, lse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, t, lse = ctx.saved_tensors
        # y.sum().backward() sends a stride-0 view; the kernel walks g with stride 1
        g = grads[0].contiguous()
        N, V = z.shape
        dz = torch.empty_like(z)
        if N:
            grid = (N, triton.cdiv(V, BLOCK))
            _backward_kernel[grid](g, z, t, lse, dz, z.stride(0), dz.stride(0), V, BLOCK=BLOCK)
        return dz, None


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of ``token_ids[n]`` under ``softmax(logits[n])``.

    Args:
        logits: [N, V] fp32, bf16 or fp16, contiguous in V. Not modified. A row may hold
            -inf (banned tokens) but needs one finite entry.
        token_ids: [N] int64 in [0, V). The range is not checked: on a GPU that would
            cost a synchronisation.

    Returns:
        [N] fp32, in nats, at most 0. Differentiable in ``logits``, once.

    Raises:
        ValueError: Shapes or devices disagree, or ``logits`` is strided in V.
        TypeError: A dtype is not listed above.

    Example:
        >>> token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([-1.3863, -1.3863])
    """
    ids = (token_ids, "N", (torch.int64,))
    match("token_logprobs", logits=(logits, "N V", FLOATS), token_ids=ids)
    if logits.stride(1) != 1:
        stride = f"stride {logits.stride(1)} in V, expected 1"
        raise ValueError(f"token_logprobs: logits has {stride}; call .contiguous()")
    if runs_reference(logits):
        return reference(logits, token_ids).to(torch.float32)
    y: Tensor = _TokenLogprobs.apply(logits, token_ids)
    return y


def _make(dims: Dims, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows rise along V so that the running maximum moves; some tokens are banned."""
    N, V = dims["N"], dims["V"]
    z = 4 * torch.randn(N, V, device=device) + torch.linspace(0, 8, V, device=device)
    z[:, -1] = -float("inf")
    if V > BLOCK:
        z[0, :BLOCK] = -float("inf")  # a whole block
    return z.to(dtype), torch.randint(V // 2, V - 1, (N,), device=device)


KERNEL = Kernel(
    fn=token_logprobs,
    reference=reference,
    make=_make,
    tests=({"N": 1, "V": 3}, {"N": 3, "V": 997}, {"N": 2, "V": 2 * BLOCK + 1}),
    bench=({"N": 4096, "V": 32_000}, {"N": 4096, "V": 151_936}),
    min_bytes=lambda d, dtype: d["N"] * d["V"] * dtype.itemsize,
    grads=(0,),
)
