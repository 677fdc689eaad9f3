"""Attention over pages of keys and values on a CPU, on ``fastsafe._native``; see ``cpu_ops``."""

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe.model.cpu_ops import AttentionFlags, expect, expect_index, refuse, side_by_side

PAGE = 16  # tokens of a page: one vector holds a feature of all its keys


class Paged:
    """The pages of packed rows and their contexts, for one step.

    Args:
        starts: [rows + 1] int64, first token of each row.
        positions: [N] int64, index of each token in its sequence; consecutive within a row.
        places: [N] int64, slot of each token's key and value: page * PAGE + offset.
        table: [rows, width] int32, the pages of each row in order.
        num_pages: Number of pages in the cache.

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
            refuse("Paged", *ints, table)
        self.starts, self.positions, self.places, self.table = *ints, table
        self.num_pages = num_pages


def page_shapes(num_pages: int, kv_heads: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of one layer's pages of keys and of values for ``paged_attention``."""
    padded = -(-dim // PAGE) * PAGE
    return (num_pages, kv_heads, dim, PAGE), (num_pages, kv_heads, PAGE, padded)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: Paged,
    flags: AttentionFlags,
) -> Tensor:
    """Write keys and values to their pages and attend from every token over its row's context.

    A token's bits depend on its own context alone: not on how its row was cut into steps, on the
    pages that hold it or on the rows beside it.

    Args:
        q: [N, H, D], each row's heads side by side.
        k: [N, Hkv, D], likewise.
        v: [N, Hkv, D], with the strides of ``k``.
        keys: [P, Hkv, D, PAGE], each page contiguous: its tokens side by side.
        values: [P, Hkv, PAGE, D], likewise, D rounded up to a multiple of PAGE.
        paged: Pages of the rows.
        flags: Scale, window and bound of the scores.

    Returns:
        [N, H, D] contiguous.
    """
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
    if v.stride(0) != k.stride(0):
        k, v = k.contiguous(), v.contiguous()
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    shapes = page_shapes(paged.num_pages, kv_heads, dim)
    fits = k.shape == v.shape == (tokens, kv_heads, dim) and heads % kv_heads == 0
    fits = fits and (keys.shape, values.shape) == shapes and paged.num_pages > 0
    fits = fits and keys[0].is_contiguous() and values[0].is_contiguous()
    expect(fits, "paged_attention", q, k, v, keys, values)
    expect_index(len(paged.positions) == tokens, "paged_attention", q, paged.positions)
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
        flags.scale,
        flags.softcap or 0.0,
        flags.window or 0,
    )
    return out
