"""The operations of a layer on a CPU in fp32, on ``fastsafe._native``: no graph, no copies.

Each runs on one core with the GIL released, except ``linear``, which takes as many threads as torch
is set to. A row's bits follow from the row alone, however many rows there are, and are the same on
every x86 CPU with AVX2 or AVX-512.
"""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fastsafe import _native
from fastsafe_kernels._spec import INTERPRET

PAGE = 16  # tokens of a page: one vector holds a feature of all its keys
# Multiplications that pay for starting threads, about a millisecond's worth on one core.
_WORTH_THREADS = 1 << 27


def takes(x: Tensor) -> bool:
    """Whether these operations are the ones for ``x``; others go to torch or to Triton.

    While Triton interprets, its kernels take the CPU's tensors, so that a test can run a whole
    model on them.
    """
    return x.is_cpu and x.dtype is torch.float32 and not INTERPRET


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plus: tuple[Tensor, Tensor] | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Multiply ``x`` by the transpose of ``weight``.

    Args:
        x: [M, I], of any strides, as is ``weight``.
        weight: [O, I].
        bias: [O], added; not with ``add_to``.
        plus: A second product, [M, R] and [O, R], added in the same pass.
        add_to: [M, O] to add the result to, in place; made anew where None. Its columns are
            contiguous. The sum over I is one chain that begins with what is there: cut into
            several calls, it has the same bits.

    Returns:
        [M, O].
    """
    terms = [(x, weight)] if plus is None else [(x, weight), plus]
    rows, width = x.shape[0], weight.shape[0]
    matrices = []
    for a, b in terms:
        of_a, of_b = _matrix(a), _matrix(b)
        if of_a[1] != rows or of_b[1] != width or of_a[2] != of_b[2]:
            _refuse("linear", a, b)
        matrices.append((of_a, of_b))
    if add_to is None:
        y = x.new_empty(rows, width)
    else:
        y = add_to
        _expect(y.shape == (rows, width) and (width < 2 or y.stride(1) == 1), "linear", y, weight)
    if bias is not None:
        _expect(bias.shape == (width,) and add_to is None, "linear", weight, bias)
        bias = bias.contiguous()
    if all(a.numel() == 0 for a, _ in terms):
        y = y.zero_() if add_to is None else y
        return y if bias is None else y.add_(bias)
    threads = torch.get_num_threads() if rows * width * x.shape[1] > _WORTH_THREADS else 1
    _native.linear(
        y.data_ptr(),
        y.stride(0),
        add_to is not None,
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
        The norm [..., C]; what was normed [..., C]; 1 / its root mean square, [...].
    """
    columns = x.shape[-1]
    _expect(weight.shape == (columns,) and weight.stride(0) == 1, "norm", x, weight)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
    h = x
    if residual is not None:
        _expect(residual.shape == x.shape, "norm", x, residual)
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
    """Derivative of ``norm`` for what was normed, plus its own upstream ``dh``: [..., C]."""
    _expect(dy.shape == h.shape, "norm_backward", dy, h)
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
    """silu(gate) * up, or gelu by tanh: [N, 2F] -> [N, F]."""
    _expect(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, "gated", gate_up)
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, columns)
    _native.gated(y.data_ptr(), gate_up.data_ptr(), rows, columns, gelu)
    return y


def gated_backward(dy: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """Derivative of ``gated``: [N, F] -> [N, 2F]."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    rows, columns = dy.shape
    _expect(gate_up.shape == (rows, 2 * columns), "gated_backward", dy, gate_up)
    d_gate_up = torch.empty_like(gate_up)
    _native.gated_backward(
        d_gate_up.data_ptr(), dy.data_ptr(), gate_up.data_ptr(), rows, columns, gelu
    )
    return d_gate_up


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the leading features of every head; ``back`` is the inverse.

    Args:
        x: [N, heads, D], each row's heads side by side.
        cos: [N, 1, R], a row's features side by side, as in ``fastsafe.model.rope``.
        sin: Like ``cos``.
        back: Rotate by the negative angle.

    Returns:
        [N, heads, D] contiguous.
    """
    rows, heads, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    _expect(
        cos.shape == sin.shape == (rows, 1, cos.shape[2])
        and cos.stride() == sin.stride()
        and cos.stride(2) == 1
        and cos.shape[2] % 2 == 0
        and cos.shape[2] <= dim,
        "rope",
        cos,
        sin,
    )
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
        cos.shape[2],
        back,
    )
    return y


class Shape(NamedTuple):
    """Of attention over packed sequences."""

    starts: Tensor  # [sequences + 1] int64, first row of each
    scale: float
    window: int | None
    softcap: float | None


def attention(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Causal attention within each sequence.

    Args:
        q: [N, H, D], each row's heads side by side.
        k: [N, Hkv, D], likewise.
        v: [N, Hkv, D], with the strides of ``k``.
        shape: Where the sequences are, and the flags.

    Returns:
        [N, H, D] contiguous, and [N, H, 2] for the backward pass.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    if v.stride(0) != k.stride(0):
        k, v = k.contiguous(), v.contiguous()
    out, scales = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1], 2)
    _plan(q, k, v, shape).forward(
        out.data_ptr(), scales.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
    )
    return out, scales


def attention_backward(
    d_out: Tensor,
    scales: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of ``attention`` for q, k and v, from its second result and its arguments."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _plan(q, k, v, shape).backward(*(t.data_ptr() for t in (dq, dk, dv, d_out, scales, q, k, v)))
    return dq, dk, dv


class Paged:
    """Where packed rows and their contexts lie in pages, for one step.

    Args:
        starts: [rows + 1] int64, first token of each row.
        positions: [N] int64, index of each token in its sequence; consecutive within a row.
        places: [N] int64, where each token's key and value go: page * PAGE + offset.
        table: [rows, width] int32, the pages of each row in order.
        num_pages: Pages that there are.

    Raises:
        ValueError: The rows do not cover the tokens, or a page or position is out of range.
    """

    def __init__(
        self, starts: Tensor, positions: Tensor, places: Tensor, table: Tensor, num_pages: int
    ) -> None:
        ints = (starts, positions, places)
        fits = all(t.is_cpu and t.dtype is torch.int64 and t.is_contiguous() for t in ints)
        fits = fits and table.is_cpu and table.dtype is torch.int32 and table.is_contiguous()
        fits = fits and table.ndim == 2 and len(starts) == len(table) + 1
        fits = fits and len(positions) == len(places) > 0
        if fits:
            first, at, place, pages = (t.numpy() for t in (*ints, table))
            fits = first[0] == 0 and first[-1] == len(at) and bool((first[1:] > first[:-1]).all())
            fits = fits and at.min() >= 0 and at.max() < PAGE * pages.shape[1]
            fits = fits and place.min() >= 0 and place.max() < PAGE * num_pages
            fits = fits and pages.min() >= 0 and pages.max() < num_pages
        if not fits:
            _refuse("Paged", *ints, table)
        self.starts, self.positions, self.places, self.table = *ints, table
        self.num_pages = num_pages


def page_shapes(num_pages: int, kv_heads: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's pages of keys and of values, as ``paged_attention`` takes them."""
    room = -(-dim // PAGE) * PAGE
    return (num_pages, kv_heads, dim, PAGE), (num_pages, kv_heads, PAGE, room)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: Paged,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Write keys and values to their pages; attend from every token over its row's context.

    A token's bits depend on its own context alone: not on how its row was cut into steps, on the
    pages that hold it or on the rows beside it.

    Args:
        q: [N, H, D], each row's heads side by side.
        k: [N, Hkv, D], likewise.
        v: [N, Hkv, D], with the strides of ``k``.
        keys: [P, Hkv, D, PAGE], each page contiguous: its tokens side by side.
        values: [P, Hkv, PAGE, D], likewise, D rounded up to a multiple of PAGE.
        paged: Where everything lies.
        scale: Multiplies q k^T.
        window: Most recent keys that a token sees, itself included; None = all.
        softcap: Bound of the scaled scores; None = none.

    Returns:
        [N, H, D] contiguous.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    if v.stride(0) != k.stride(0):
        k, v = k.contiguous(), v.contiguous()
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    shapes = page_shapes(paged.num_pages, kv_heads, dim)
    _expect(
        k.shape == v.shape == (tokens, kv_heads, dim) and heads % kv_heads == 0,
        "paged_attention",
        q,
        k,
        v,
    )
    _expect(
        (keys.shape, values.shape) == shapes
        and paged.num_pages > 0
        and keys[0].is_contiguous()
        and values[0].is_contiguous(),
        "paged_attention",
        keys,
        values,
    )
    _expect_index(len(paged.positions) == tokens, "paged_attention", q, paged.positions)
    out = q.new_empty(q.shape)
    _native.paged_attention(
        out.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        paged.starts.data_ptr(),
        paged.positions.data_ptr(),
        paged.places.data_ptr(),
        paged.table.data_ptr(),
        paged.table.shape[0],
        paged.table.shape[1],
        heads,
        kv_heads,
        dim,
        q.stride(0),
        k.stride(0),
        keys.stride(0),
        values.stride(0),
        scale,
        softcap or 0.0,
        window or 0,
    )
    return out


def _plan(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> _native.Attention:
    rows, heads, dim = q.shape
    _expect(k.shape == v.shape == (rows, k.shape[1], dim), "attention", q, k, v)
    _expect(heads % k.shape[1] == 0, "attention", q, k)
    starts = shape.starts
    covers = starts.is_contiguous() and int(starts[0]) == 0 and int(starts[-1]) == rows
    _expect_index(covers, "attention", q, starts)
    return _native.Attention(
        shape.starts.data_ptr(),
        len(shape.starts) - 1,
        heads,
        k.shape[1],
        dim,
        q.stride(0),
        k.stride(0),
        shape.scale,
        shape.softcap or 0.0,
        shape.window or 0,
    )


def _rows(x: Tensor) -> Tensor:
    """``x`` [N, heads, D] with each row's heads side by side, copied only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    if not takes(x) or x.ndim != 2:
        _refuse("linear", x)
    rows, columns = x.shape
    row_stride, column_stride = x.stride()
    return x.data_ptr(), rows, columns, row_stride, column_stride


def _expect(fits: bool, op: str, *tensors: Tensor) -> None:
    if not fits or not all(map(takes, tensors)):
        _refuse(op, *tensors)


def _expect_index(fits: bool, op: str, x: Tensor, index: Tensor) -> None:
    if not fits or index.dtype != torch.int64 or not index.is_cpu:
        _refuse(op, x, index)


def _refuse(op: str, *tensors: Tensor) -> NoReturn:
    found = ", ".join(
        f"{list(t.shape)} {t.dtype} with strides {t.stride()} on {t.device}" for t in tensors
    )
    raise ValueError(f"{op}: tensors do not fit: {found}")
