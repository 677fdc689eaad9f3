"""Paged KV cache: keys and values in pages, and attention of packed tokens over them.

A ``_native.StepPlan`` gives the cache slot of each token and the pages of each row. A token attends
to its row's context through these pages, by sums in a fixed order: its bits depend neither on how
the prompt was cut into steps nor on which pages came from the prefix cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe._native as _native
import fastsafe_kernels as ops
from fastsafe.model import cpu_paged
from fastsafe.model.config import ModelConfig
from fastsafe.model.cpu_ops import AttentionFlags
from fastsafe.model.transformer import QKNorms
from fastsafe_kernels._spec import INTERPRET

# Tokens per page of the GPU kernels: 16 KB of keys in bf16 at a head size of 128, read at once.
DEVICE_PAGE = 64


def is_native(device: torch.device) -> bool:
    """Return whether pages have the layout of ``fastsafe.model.cpu_paged``, not of the kernels."""
    return device.type == "cpu" and not INTERPRET


def page_tokens(device: torch.device) -> int:
    """Return the tokens per page on this device."""
    return cpu_paged.PAGE if is_native(device) else DEVICE_PAGE


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the KV cache for a model with this weight dtype."""
    return torch.float32 if is_native(device) else dtype


class PageStore:
    """Memory of all pages; on a GPU with one page more, which padding rows write to.

    Attributes:
        keys: All pages of each layer: [P, Hkv, PAGE, D], or on a CPU the fp32 layout of
            ``cpu_paged.paged_attention``. The layers of a page are adjacent in memory.
        values: Likewise.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_pages = num_pages
        self.device = device
        heads, dim = config.num_kv_heads, config.head_dim
        shapes: Sequence[tuple[int, ...]]
        if is_native(device):
            shapes = cpu_paged.page_shapes(num_pages, heads, dim)
        else:
            shapes = [(num_pages + 1, heads, DEVICE_PAGE, dim)] * 2
        dtype = cache_dtype(device, dtype)
        self._pages = [
            torch.empty(shape[0], config.num_layers, *shape[1:], device=device, dtype=dtype)
            for shape in shapes
        ]
        self.keys, self.values = (list(pages.unbind(1)) for pages in self._pages)

    def copy(self, pairs: Tensor) -> None:
        """Copy pages: ``pairs`` [n, 2] int64, from and to; no page is in both columns."""
        if len(pairs):
            source, target = pairs.to(self.device).unbind(1)
            for pages in self._pages:
                pages.index_copy_(0, target, pages.index_select(0, source))


def paged_of(store: PageStore, plan: _native.StepPlan) -> cpu_paged.Paged:
    """Return the cache slots and pages of a step's rows on a CPU."""
    return cpu_paged.Paged(
        torch.from_numpy(plan.starts),
        torch.from_numpy(plan.positions),
        torch.from_numpy(plan.cache_slots),
        torch.from_numpy(plan.table),
        store.num_pages,
    )


class NativeAttention:
    """``Attend`` of one step on a CPU, for models that ``NativeDecoder`` does not run."""

    def __init__(self, store: PageStore, plan: _native.StepPlan) -> None:
        self._store = store
        self._paged = paged_of(store, plan)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        """Write to the pages and attend; see ``Attend``."""
        q32, k32, v32, paged = q.float(), k.float(), v.float(), self._paged
        keys, values = self._store.keys[layer], self._store.values[layer]
        out = cpu_paged.paged_attention(q32, k32, v32, keys, values, paged, flags)
        return out.to(q.dtype)


class SharedPrefix(NamedTuple):
    """The tokens of a step that follow a prefix which all rows of an adapter share.

    They attend to the prefix together, and each to the rest of its own row.
    """

    num_pages: int  # full pages of the prefix
    inside: Tensor  # [n] tokens of the prefix itself, and padding
    groups: tuple[tuple[Tensor, Tensor], ...]  # for each adapter: its tokens [m], prefix pages


class OpsAttention:
    """``Attend`` of one step on the GPU kernels; it never waits for the device.

    Args:
        store: The pages.
        table: [N, width] int32, the pages of each token's row.
        cache_slots: [N] int64, where keys and values are written.
        lengths: [N] int64, tokens that each token attends to, itself included; 0 for padding.
        shared: Prefix that rows attend to together, where the caller says that they share one.
    """

    def __init__(
        self,
        store: PageStore,
        table: Tensor,
        cache_slots: Tensor,
        lengths: Tensor,
        shared: SharedPrefix | None = None,
    ) -> None:
        self._shared = shared
        self._store = store
        self._table = table
        self._cache_slots = cache_slots
        self._lengths = lengths

    def from_qkv(
        self,
        layer: int,
        qkv: Tensor,
        rotation: tuple[Tensor, Tensor],
        norms: QKNorms | None,
        flags: AttentionFlags,
    ) -> Tensor:
        """Norm, rotate, write to the pages and attend, in two launches; see ``AttendQKV``."""
        cos, sin = (x[:, 0] for x in rotation)
        keys, values = self._store.keys[layer], self._store.values[layer]
        slots = self._cache_slots
        q = ops.rope_kv_write(qkv, cos, sin, keys, values, slots, *(norms or ()))
        return self._attend(layer, q, flags)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, flags: AttentionFlags
    ) -> Tensor:
        """Write to the pages and attend; see ``Attend``."""
        page, offset = self._cache_slots // DEVICE_PAGE, self._cache_slots % DEVICE_PAGE
        self._store.keys[layer][page, :, offset] = k
        self._store.values[layer][page, :, offset] = v
        return self._attend(layer, q, flags)

    def _attend(self, layer: int, q: Tensor, flags: AttentionFlags) -> Tensor:
        scale, window, softcap = flags
        keys, values = self._store.keys[layer], self._store.values[layer]

        def attend(q: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            return ops.paged_decode(
                q, keys, values, table, lengths, scale, window or 0, softcap or 0.0
            )

        if self._shared is None or window is not None:  # a window may begin inside the prefix
            return attend(q, self._table, self._lengths)[0]
        prefix_pages, inside, groups = self._shared
        out = torch.empty_like(q)
        if len(inside):
            out[inside] = attend(q[inside], self._table[inside], self._lengths[inside])[0]
        for tokens, prefix in groups:
            # [pages, Hkv, PAGE, D] -> [tokens, Hkv, D]
            k, v = (x[prefix].transpose(1, 2).flatten(0, 1) for x in (keys, values))
            over_prefix = ops.prefix_attention(q[tokens], k, v, scale, softcap or 0.0)
            over_rest = attend(
                q[tokens],
                self._table[tokens, prefix_pages:],
                self._lengths[tokens] - prefix_pages * DEVICE_PAGE,
            )
            out[tokens] = ops.merge_attention(*over_prefix, *over_rest)[0]
        return out
