"""Keys and values in pages, and attention of packed tokens over them.

What a step holds is in a ``_native.Plan``: which token goes where, and the pages of each row. Every
token attends to its own row's context through the row's pages, by sums in a fixed order, so that
its bits depend neither on how a prompt was cut into steps nor on which pages were found computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe._native as _native
import fastsafe_kernels as ops
from fastsafe.model import cpu_paged
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import QKNorms
from fastsafe_kernels._spec import INTERPRET

# Tokens of a page for the kernels of a GPU: 16 KB of keys in bf16 at a head size of 128, read in
# one piece.
DEVICE_PAGE = 64


def is_native(device: torch.device) -> bool:
    """Whether pages are those of ``fastsafe.model.cpu_paged``; else those of the kernels."""
    return device.type == "cpu" and not INTERPRET


def page_tokens(device: torch.device) -> int:
    """Tokens of a page on this device."""
    return cpu_paged.PAGE if is_native(device) else DEVICE_PAGE


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are held in where the model's weights have ``dtype``."""
    return torch.float32 if is_native(device) else dtype


class PageStore:
    """Memory of all pages; on a GPU one more, where idle rows write.

    Attributes:
        keys: Of each layer, all pages: [P, Hkv, PAGE, D], or on a CPU as ``paged.paged_attention``
            takes them, in fp32 whatever the model's dtype. The layers of a page lie together.
        values: Likewise.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_pages = num_pages
        self.device = device
        heads, dim, held = config.num_kv_heads, config.head_dim, cache_dtype(device, dtype)
        shapes: Sequence[tuple[int, ...]]
        if is_native(device):
            shapes = cpu_paged.page_shapes(num_pages, heads, dim)
        else:
            shapes = [(num_pages + 1, heads, DEVICE_PAGE, dim)] * 2
        self._pages = [
            torch.empty(shape[0], config.num_layers, *shape[1:], device=device, dtype=held)
            for shape in shapes
        ]
        self.keys, self.values = (list(pages.unbind(1)) for pages in self._pages)

    def copy(self, pairs: Tensor) -> None:
        """Copy pages: ``pairs`` [n, 2] int64, from and to; no page is in both columns."""
        if len(pairs):
            source, target = pairs.to(self.device).unbind(1)
            for pages in self._pages:
                pages.index_copy_(0, target, pages.index_select(0, source))


def paged_of(store: PageStore, plan: _native.Plan) -> cpu_paged.Paged:
    """Where the rows of a step lie in a CPU's pages."""
    return cpu_paged.Paged(
        torch.from_numpy(plan.starts),
        torch.from_numpy(plan.positions),
        torch.from_numpy(plan.places),
        torch.from_numpy(plan.table),
        store.num_pages,
    )


class NativeAttention:
    """``Attend`` of one step on a CPU, for models that ``model.native`` does not take."""

    def __init__(self, store: PageStore, plan: _native.Plan) -> None:
        self._store = store
        self._paged = paged_of(store, plan)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write to the pages and attend; see ``Attend``."""
        pages = self._store.keys[layer], self._store.values[layer]
        out = cpu_paged.paged_attention(
            *(q.float(), k.float(), v.float(), *pages, self._paged),
            scale=scale,
            window=window,
            softcap=softcap,
        )
        return out.to(q.dtype)


class SharedPrefix(NamedTuple):
    """Which tokens of a step follow a prefix that all rows of an adapter share.

    They attend to it together, and to their own row's tokens behind it one by one.
    """

    num_pages: int  # full pages of the prefix
    inside: Tensor  # [n] tokens of the prefix itself, and idle ones
    groups: tuple[tuple[Tensor, Tensor], ...]  # tokens [m] of an adapter, its prefix's pages


class OpsAttention:
    """``Attend`` of one step on the kernels of a GPU; nothing here waits for the device.

    Args:
        store: The pages.
        table: [N, width] int32, the pages of each token's row.
        places: [N] int64, where each token's key and value go.
        lengths: [N] int64, tokens that each attends to, itself included; 0 for an idle one.
        shared: What is attended to together, where the caller has said that it is shared.
    """

    def __init__(
        self,
        store: PageStore,
        table: Tensor,
        places: Tensor,
        lengths: Tensor,
        shared: SharedPrefix | None = None,
    ) -> None:
        self._shared = shared
        self._store = store
        self._table = table
        self._places = places
        self._lengths = lengths

    def from_qkv(
        self,
        layer: int,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        norms: QKNorms | None,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Norm, rotate, write to the pages and attend, in two launches; see ``AttendQKV``."""
        cos, sin = (x[:, 0] for x in rotation)
        pages = self._store.keys[layer], self._store.values[layer]
        q = ops.rope_kv_write(qkv, cos, sin, *pages, self._places, *(norms or ()))
        return self._attend(layer, q, scale, window, softcap)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write to the pages and attend; see ``Attend``."""
        page, offset = self._places // DEVICE_PAGE, self._places % DEVICE_PAGE
        self._store.keys[layer][page, :, offset] = k
        self._store.values[layer][page, :, offset] = v
        return self._attend(layer, q, scale, window, softcap)

    def _attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        pages = self._store.keys[layer], self._store.values[layer]
        near, cap = window or 0, softcap or 0.0
        if self._shared is None or window is not None:  # a window may end within the prefix
            return ops.paged_decode(q, *pages, self._table, self._lengths, scale, near, cap)[0]
        count, inside, groups = self._shared
        out = torch.empty_like(q)
        if len(inside):
            rows = self._table[inside], self._lengths[inside]
            out[inside] = ops.paged_decode(q[inside], *pages, *rows, scale, near, cap)[0]
        for tokens, prefix in groups:
            own, table = q[tokens], self._table[tokens, count:]
            lengths = self._lengths[tokens] - count * DEVICE_PAGE
            # [pages, Hkv, PAGE, D] -> [tokens, Hkv, D]
            k, v = (x[prefix].transpose(1, 2).flatten(0, 1) for x in pages)
            before = ops.prefix_attention(own, k, v, scale, cap)
            behind = ops.paged_decode(own, *pages, table, lengths, scale, near, cap)
            out[tokens] = ops.merge_attention(*before, *behind)[0]
        return out
