"""A decoder's forward pass on a CPU in fp32 as one call, on ``fastsafe._native``.

Computes ``Transformer.forward`` without a graph, by the same operations and so with the same bits;
but no Python runs between them, so threads do not wait for the interpreter's lock. As many threads
as torch is set to share each operation, which changes no bit.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import fastsafe._native as _native
from fastsafe.model import cpu_ops
from fastsafe.model.cpu_paged import Paged, page_shapes
from fastsafe.model.lora import FusedLora
from fastsafe.model.nf4 import NF4Transformer
from fastsafe.model.transformer import Key, Transformer

_NAMES = ("qkv", "o", "gate_up", "down")
_NORMS = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "q_norm", "k_norm")


class AdapterPatch:
    """An adapter for ``NativeDecoder``: merged weights, or updates of the linear layers.

    Args:
        model: The base.
        weights: Merged weights, [O, I] each, in place of the base's.
        updates: Updates to add to the base's products.
    """

    def __init__(
        self,
        model: Transformer,
        weights: Mapping[Key, Tensor] | None = None,
        updates: Mapping[Key, FusedLora] | None = None,
    ) -> None:
        self.patches = _native.Patches(len(_NAMES) * len(model.layers))
        self._tensors: list[Tensor] = []  # kept alive, as ``patches`` points to them
        for (layer, name), weight in (weights or {}).items():
            cpu_ops.expect(weight.shape == model.weight(layer, name).shape, "AdapterPatch", weight)
            self.patches.replace(_index(layer, name), self._address(weight))
        for (layer, name), lora in (updates or {}).items():
            parts = [(p.begin, p.end, p.r0, p.r1, self._address(p.lora_B)) for p in lora.parts]
            a = lora.lora_A
            self.patches.add(_index(layer, name), self._address(a), len(a), parts)

    def _address(self, x: Tensor) -> int:
        x = x.contiguous()
        cpu_ops.expect(x.ndim == 2, "AdapterPatch", x)
        self._tensors.append(x)
        return x.data_ptr()


class Span(NamedTuple):
    """Packed rows of one adapter."""

    patch: AdapterPatch | None  # None: the base
    end: int  # end of its packed rows
    kept_end: int  # end of its kept rows


def runs_natively(model: Transformer) -> bool:
    """Return whether ``NativeDecoder`` runs this model: on a CPU, in fp32, not quantized."""
    return cpu_ops.runs_natively(model.embedding) and not isinstance(model, NF4Transformer)


class NativeDecoder:
    """The forward pass; calls share one workspace, so only one may run at a time.

    Args:
        model: A model that ``runs_natively``; its weights are not copied.

    Raises:
        ValueError: ``runs_natively`` is false.
    """

    def __init__(self, model: Transformer) -> None:
        if not runs_natively(model):
            cpu_ops.refuse("NativeDecoder", model.embedding)
        self.model = model
        self._tensors = model.parameters()  # kept alive, as the layers point to them
        config = model.config
        layers = []
        for i, layer in enumerate(model.layers):
            linears = [
                (
                    _address(model.weight(i, n)),
                    _address(model.bias(i, n)),
                    *model.weight(i, n).shape,
                )
                for n in _NAMES
            ]
            norms = [_address(getattr(layer, name)) for name in _NORMS]
            window = config.windows[i] or 0
            layers.append(_native.Layer(linears, norms, window, config.rope_of_layer[i]))
        self._decoder = _native.Decoder(
            config.vocab_size,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.norm_eps,
            config.attention_scale,
            config.attention_softcap or 0.0,
            model.embedding_scale,
            config.residual_scale,
            config.norm_one_plus,
            config.activation != "silu",
            config.qk_norm == "projection",
            layers,
            _address(model.embedding),
            _address(model.final_norm),
        )

    def forward(
        self,
        token_ids: Tensor,
        paged: Paged,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        spans: Sequence[Span],
        keep: Tensor,
        context_lens: Tensor,
    ) -> Tensor:
        """Run all layers over packed rows; see ``Transformer.forward``.

        Args:
            token_ids: [N] int64.
            paged: Pages of the rows and their contexts.
            keys: Pages of each layer, as ``cpu_paged.paged_attention`` takes them; the layers are
                equally spaced in memory.
            values: Likewise.
            spans: Adapters of the rows, which are sorted by adapter.
            keep: [M] int64, rows whose final state is returned.
            context_lens: [N] int64, length of each row's own sequence.

        Returns:
            [M, E].

        Raises:
            ValueError: A token id is not in the vocabulary, or tensors do not fit.
        """
        model, config, count = self.model, self.model.config, len(token_ids)
        shapes = page_shapes(paged.num_pages, config.num_kv_heads, config.head_dim)
        pages = keys[0], values[0]
        fits = tuple(x.shape for x in pages) == shapes and all(x[0].is_contiguous() for x in pages)
        fits = fits and spans[-1].end == count == len(paged.positions)
        fits = fits and spans[-1].kept_end == len(keep) and keep.is_contiguous()
        cpu_ops.expect(fits and token_ids.is_contiguous(), "NativeDecoder", *pages)
        for index in (token_ids, keep):
            cpu_ops.expect_index(True, "NativeDecoder", pages[0], index)
        rotations = model.rotations(paged.positions, context_lens)
        out = model.embedding.new_empty(len(keep), config.hidden_size)
        self._decoder.forward(
            out.data_ptr(),
            token_ids.data_ptr(),
            count,
            keep.data_ptr(),
            len(keep),
            [(s.patch.patches if s.patch else None, s.end, s.kept_end) for s in spans],
            [(c.data_ptr(), s.data_ptr(), c.stride(0), c.shape[2]) for c, s in rotations],
            paged.starts.data_ptr(),
            paged.positions.data_ptr(),
            paged.places.data_ptr(),
            paged.table.data_ptr(),
            paged.table.shape[0],
            paged.table.shape[1],
            keys[0].data_ptr(),
            values[0].data_ptr(),
            keys[0].stride(0),
            values[0].stride(0),
            _distance(keys),
            _distance(values),
            torch.get_num_threads(),
        )
        return out


def _index(layer: int, name: str) -> int:
    return layer * len(_NAMES) + _NAMES.index(name)


def _address(x: Tensor | None) -> int:
    if x is None:
        return 0
    cpu_ops.expect(x.is_contiguous(), "NativeDecoder", x)
    return x.data_ptr()


def _distance(layers: Sequence[Tensor]) -> int:
    """Return the number of elements from one layer's pages to the next one's."""
    if len(layers) == 1:
        return 0
    starts = [x.data_ptr() // x.element_size() for x in layers]
    distance = starts[1] - starts[0]
    is_even = all(b - a == distance for a, b in pairwise(starts))
    cpu_ops.expect(is_even, "NativeDecoder", *layers)
    return distance
