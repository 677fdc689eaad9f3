"""Keys and values of one tile's sequences in pages, as the attention kernels of a GPU read them."""

import torch
from torch import Tensor

import fastsafe_kernels as ops
from fastsafe.model.config import ModelConfig
from fastsafe.model.transformer import QKNorms

PAGE = 64  # tokens: 16 KB of keys in bf16 at a head size of 128, read in one piece


class PagedCache:
    """Cache of a tile: one row of pages per sequence; dropping sequences moves nothing.

    Attributes:
        keys: Per layer, [P, Hkv, PAGE, D]; ``values`` likewise.
        block_table: [rows, pages of a row] int32, the pages of each sequence in order.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        pages = -(-capacity // PAGE)
        shape = (num_rows * pages, config.num_kv_heads, PAGE, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        table = torch.arange(num_rows * pages, dtype=torch.int32, device=device)
        self.block_table = table.view(num_rows, pages)

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where tokens lie: page * PAGE + offset, [N] int64."""
        return self.block_table[rows, positions // PAGE].long() * PAGE + positions % PAGE

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the keys and values [N, Hkv, D] of these rows' tokens."""
        slots = self.slots(rows, positions)
        self.keys[layer][slots // PAGE, :, slots % PAGE] = k
        self.values[layer][slots // PAGE, :, slots % PAGE] = v

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but ``rows`` [M]."""
        self.block_table = self.block_table[rows]

    def decode(self, positions: Tensor, longest: int) -> "PagedDecode":
        """Attention of one step; see ``KVCache.decode``."""
        return PagedDecode(self, positions)


class PagedDecode:
    """Attention of one new token per sequence over its pages."""

    def __init__(self, cache: PagedCache, positions: Tensor) -> None:
        self._cache = cache
        self._rows = torch.arange(len(positions), device=positions.device)
        self._positions = positions
        self._slots = cache.slots(self._rows, positions)
        self._lengths = positions + 1

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
        pages = self._cache.keys[layer], self._cache.values[layer]
        q = ops.rope_kv_write(qkv, cos, sin, *pages, self._slots, *(norms or ()))
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
        self._cache.write(layer, self._rows, self._positions, k, v)
        return self._attend(layer, q, scale, window, softcap)

    def _attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        cache = self._cache
        pages = cache.keys[layer], cache.values[layer], cache.block_table
        return ops.paged_decode(q, *pages, self._lengths, scale, window or 0, softcap or 0.0)[0]
