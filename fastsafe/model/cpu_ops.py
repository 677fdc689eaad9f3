"""The operations of a layer on a CPU in fp32, on ``fastsafe._native``: no graph, no copies.

Each runs on one core with the GIL released, except ``linear``, which takes as many threads as torch
is set to, or as ``shared_products`` says. A row's bits follow from the row alone, however many rows
there are, and are the same on every x86 CPU with AVX2 or AVX-512.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe_kernels._spec import INTERPRET

# Multiplications from which sharing pays off, about a tenth of a millisecond on one core.
_WORTH_THREADS = 1 << 23
_shared = threading.local()  # threads that share this thread's products


@contextmanager
def shared_products(threads: int) -> Iterator[None]:
    """Have this many threads share the products that this thread computes; no bit changes.

    Unlike torch's own number of threads, on which the order of its sums depends.
    """
    _shared.threads = threads
    try:
        yield
    finally:
        _shared.threads = None


def _product_threads() -> int:
    return getattr(_shared, "threads", None) or torch.get_num_threads()


def runs_natively(x: Tensor) -> bool:
    """Return whether ``x`` takes these operations; other tensors take torch or Triton.

    While Triton interprets, its kernels take the CPU's tensors, so that a test can run a whole
    model on them.
    """
    return x.is_cpu and x.dtype is torch.float32 and not INTERPRET


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second_product: tuple[Tensor, Tensor] | None = None,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """Multiply ``x`` by the transpose of ``weight``.

    Args:
        x: [M, I], of any strides, as is ``weight``.
        weight: [O, I].
        bias: [O], added; not with ``accumulate_into``.
        second_product: Factors [M, R] and [O, R] of a second product, added in the same pass.
        accumulate_into: [M, O] with contiguous columns, to add the result to in place; None
            allocates. Accumulates in index order starting from the present value, so splitting I
            over several calls gives identical bits.

    Returns:
        [M, O].
    """
    terms = [(x, weight)] if second_product is None else [(x, weight), second_product]
    rows, width = x.shape[0], weight.shape[0]
    matrices = []
    for a, b in terms:
        of_a, of_b = _matrix(a), _matrix(b)
        if of_a[1] != rows or of_b[1] != width or of_a[2] != of_b[2]:
            refuse("linear", a, b)
        matrices.append((of_a, of_b))
    if accumulate_into is None:
        y = x.new_empty(rows, width)
    else:
        y = accumulate_into
        expect(y.shape == (rows, width) and (width < 2 or y.stride(1) == 1), "linear", y, weight)
    if bias is not None:
        expect(bias.shape == (width,) and accumulate_into is None, "linear", weight, bias)
        bias = bias.contiguous()
    if all(a.numel() == 0 for a, _ in terms):
        y = y.zero_() if accumulate_into is None else y
        return y if bias is None else y.add_(bias)
    threads = _product_threads() if rows * width * x.shape[1] > _WORTH_THREADS else 1
    _native.linear(
        y.data_ptr(),
        y.stride(0),
        accumulate_into is not None,
        matrices,
        0 if bias is None else bias.data_ptr(),
        threads,
    )
    return y


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    one_plus: bool,
    residual: Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of ``residual + alpha x``, or of ``x``.

    Args:
        x: [..., C] contiguous.
        weight: [C].
        eps: Added to the mean square.
        one_plus: Multiply by 1 + weight.
        residual: [..., C] contiguous.
        alpha: Factor of ``x`` where there is a residual.

    Returns:
        The norm [..., C]; its input [..., C], the sum if there is a residual; 1 / the root mean
        square of that, [...].
    """
    columns = x.shape[-1]
    expect(weight.shape == (columns,) and weight.stride(0) == 1, "norm", x, weight)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
    h = x
    if residual is not None:
        expect(residual.shape == x.shape, "norm", x, residual)
        residual, h = residual.contiguous(), torch.empty_like(x)
    _native.norm(
        y.data_ptr(),
        h.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        scale.numel(),
        columns,
        alpha,
        eps,
        one_plus,
    )
    return y, h, scale


def norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, scale: Tensor, weight: Tensor, one_plus: bool
) -> Tensor:
    """Compute the gradient of the input ``h`` of ``norm``, ``dh`` added to it: [..., C]."""
    expect(dy.shape == h.shape, "norm_backward", dy, h)
    dy, dx = dy.contiguous(), torch.empty_like(h)
    if dh is not None:
        dh = dh.contiguous()
    _native.norm_backward(
        dx.data_ptr(),
        dy.data_ptr(),
        0 if dh is None else dh.data_ptr(),
        h.data_ptr(),
        scale.data_ptr(),
        weight.data_ptr(),
        scale.numel(),
        h.shape[-1],
        one_plus,
    )
    return dx


def gated(gate_up: Tensor, gelu: bool) -> Tensor:
    """Compute silu(gate) * up, or with the tanh approximation of gelu: [N, 2F] -> [N, F]."""
    expect(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, "gated", gate_up)
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, columns)
    _native.gated(y.data_ptr(), gate_up.data_ptr(), rows, columns, gelu)
    return y


def gated_backward(dy: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """Compute the gradient of the input of ``gated``: [N, F] -> [N, 2F]."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    rows, columns = dy.shape
    expect(gate_up.shape == (rows, 2 * columns), "gated_backward", dy, gate_up)
    d_gate_up = torch.empty_like(gate_up)
    _native.gated_backward(
        d_gate_up.data_ptr(), dy.data_ptr(), gate_up.data_ptr(), rows, columns, gelu
    )
    return d_gate_up


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the leading features of every head.

    Args:
        x: [N, heads, D], each row's heads side by side.
        cos: [N, 1, R], a row's features side by side, as in ``fastsafe.model.rope``.
        sin: Like ``cos``.
        inverse: Rotate by the negative angle.

    Returns:
        [N, heads, D] contiguous.
    """
    rows, heads, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    rotated = cos.shape[2]
    fits = cos.shape == sin.shape == (rows, 1, rotated) and rotated % 2 == 0 and rotated <= dim
    fits = fits and cos.stride() == sin.stride() and cos.stride(2) == 1
    expect(fits, "rope", cos, sin)
    y = x.new_empty(rows, heads, dim)
    _native.rope(
        y.data_ptr(),
        heads * dim,
        x.data_ptr(),
        x.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        rows,
        heads,
        dim,
        rotated,
        inverse,
    )
    return y


class AttentionFlags(NamedTuple):
    """How a layer scores the keys that a query sees."""

    scale: float  # multiplies q k^T
    window: int | None  # keys that a query sees, itself included; None = all before it
    softcap: float | None  # bound of the scaled scores; None = none


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, flags: AttentionFlags
) -> tuple[Tensor, Tensor]:
    """Causal attention within each sequence.

    Args:
        q: [N, H, D], each row's heads side by side.
        k: [N, Hkv, D], likewise.
        v: [N, Hkv, D], with the strides of ``k``.
        starts: [sequences + 1] int64, first row of each sequence, and the end of the last.
        flags: Scale, window and bound of the scores.

    Returns:
        [N, H, D] contiguous, and [N, H, 2] for the backward pass.
    """
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
    if v.stride(0) != k.stride(0):
        k, v = k.contiguous(), v.contiguous()
    out, scales = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1], 2)
    _plan(q, k, v, starts, flags).forward(
        out.data_ptr(), scales.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
    )
    return out, scales


def attention_backward(
    d_out: Tensor,
    scales: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    flags: AttentionFlags,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v from ``attention``'s second result and arguments."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    plan = _plan(q, k, v, starts, flags)
    plan.backward(*(t.data_ptr() for t in (dq, dk, dv, d_out, scales, q, k, v)))
    return dq, dk, dv


def _plan(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, flags: AttentionFlags
) -> _native.Attention:
    rows, heads, dim = q.shape
    expect(k.shape == v.shape == (rows, k.shape[1], dim), "attention", q, k, v)
    expect(heads % k.shape[1] == 0, "attention", q, k)
    covers = starts.is_contiguous() and int(starts[0]) == 0 and int(starts[-1]) == rows
    expect_index(covers, "attention", q, starts)
    return _native.Attention(
        starts.data_ptr(),
        len(starts) - 1,
        heads,
        k.shape[1],
        dim,
        q.stride(0),
        k.stride(0),
        flags.scale,
        flags.softcap or 0.0,
        flags.window or 0,
    )


def side_by_side(x: Tensor) -> Tensor:
    """Return ``x`` [N, heads, D] with each row's heads contiguous; copies only if needed."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    if not runs_natively(x) or x.ndim != 2:
        refuse("linear", x)
    rows, columns = x.shape
    row_stride, column_stride = x.stride()
    return x.data_ptr(), rows, columns, row_stride, column_stride


def expect(fits: bool, op: str, *tensors: Tensor) -> None:
    """Raise ValueError unless ``fits``, and all tensors are for these operations."""
    if not fits or not all(map(runs_natively, tensors)):
        refuse(op, *tensors)


def expect_index(fits: bool, op: str, x: Tensor, index: Tensor) -> None:
    """Raise ValueError unless ``fits``, and ``index`` is int64 on the CPU."""
    if not fits or index.dtype != torch.int64 or not index.is_cpu:
        refuse(op, x, index)


def refuse(op: str, *tensors: Tensor) -> NoReturn:
    """Raise a ValueError that names the operation and describes the tensors."""
    described = ", ".join(
        f"{list(t.shape)} {t.dtype} with strides {t.stride()} on {t.device}" for t in tensors
    )
    raise ValueError(f"{op}: tensors do not fit: {described}")
