"""Keys and values of one tile's sequences, and attention over them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsafe.engine.paged_cache import PagedCache
from fastsafe.model import cpu
from fastsafe.model.attention import PackedAttention
from fastsafe.model.config import ModelConfig
from fastsafe_kernels._spec import INTERPRET

# Context lengths are rounded up to this many tokens, so that a row's softmax and value sums run
# over whole vectors and zeros beyond its own context add nothing to its bits.
CONTEXT_STEP = 16


def make_cache(
    config: ModelConfig, num_rows: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> "KVCache | PagedCache":
    """Dense on a CPU; in pages elsewhere, and while Triton interprets."""
    kind = KVCache if device.type == "cpu" and not INTERPRET else PagedCache
    return kind(config, num_rows, capacity, device, dtype)


class KVCache:
    """Dense cache of a tile: one row per sequence, a fixed capacity of tokens."""

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        steps = -(-capacity // CONTEXT_STEP)
        shape = (num_rows, config.num_kv_heads, steps * CONTEXT_STEP, config.head_dim)
        layers = range(config.num_layers)
        # zeros, not empty: a masked position still takes part in 0 * value
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the keys and values [N, Hkv, D] of these rows' tokens."""
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v

    def decode(self, positions: Tensor, longest: int) -> "Decode":
        """Attention of one step.

        Args:
            positions: [M] int64, index of the new token of each sequence.
            longest: Largest of ``positions``, known to the caller without a device read.
        """
        return Decode(self, positions, longest)

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but ``rows`` [M]."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time: never two whole caches
                tensors[layer] = tensor[rows]


class Prefill:
    """Attention of whole prompts; writes their keys and values into the cache."""

    def __init__(
        self, cache: KVCache | PagedCache, rows: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Lay out sequences of these lengths for these rows of the cache."""
        device = cache.keys[0].device
        self._cache = cache
        self._packed = PackedAttention(lengths)
        counts = torch.tensor(lengths, device=device)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.rows = torch.tensor(rows, device=device).repeat_interleave(counts)
        self.positions = torch.arange(sum(lengths), device=device) - starts
        self.last = counts.cumsum(0) - 1

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
        """Attend within each prompt; see ``Attend``."""
        self._cache.write(layer, self.rows, self.positions, k, v)
        return self._packed(layer, q, k, v, scale=scale, window=window, softcap=softcap)


class Decode:
    """Attention of one new token per sequence over its cached context."""

    def __init__(self, cache: KVCache, positions: Tensor, longest: int) -> None:
        """Prepare one step; see ``KVCache.decode``."""
        self._cache = cache
        self._positions = positions
        self._lengths = positions + 1
        self._rows = torch.arange(len(positions), device=positions.device)
        self._span = (longest // CONTEXT_STEP + 1) * CONTEXT_STEP
        self._bias: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, num_kv_heads: int, group: int) -> Tensor:
        """0 where a row may look and -inf elsewhere, [M * Hkv, group, span] fp32."""
        bias = self._bias.get(window)
        if bias is None:
            context = torch.arange(self._span, device=self._positions.device)
            hidden = context > self._positions[:, None]
            if window is not None:
                hidden |= context <= self._positions[:, None] - window
            bias = torch.zeros(hidden.shape, device=hidden.device)
            bias.masked_fill_(hidden, -float("inf"))
            shape = (len(hidden), num_kv_heads, group, self._span)
            bias = bias[:, None, None].expand(shape).reshape(-1, group, self._span)
            self._bias[window] = bias
        return bias

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
        """Attend over the cache; see ``Attend``."""
        rows, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._cache.write(layer, self._rows, self._positions, k, v)
        if cpu.takes(q):
            return cpu.decode(
                q, keys, values, self._lengths, scale=scale, window=window, softcap=softcap
            )
        keys = keys[:, :, : self._span].flatten(0, 1)
        values = values[:, :, : self._span].flatten(0, 1)
        # the queries of one key/value head form one small matrix
        queries = q.reshape(rows * num_kv_heads, group, head_dim)
        bias = self._mask(window, num_kv_heads, group)
        if softcap is None and q.dtype == torch.float32:
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
        else:
            scores = torch.bmm(queries, keys.transpose(1, 2)).float() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores += bias
        weights = torch.softmax(scores, -1).to(values.dtype)
        return torch.bmm(weights, values).view(rows, num_heads, head_dim)
