"""Fused Triton ops. Each file is one op: definition, kernel, launcher, test points."""

from ._segments import Segments
from ._varlen import choose_backend, varlen_attention
from .adamw import adamw
from .gated import gated
from .grouped_lora import grouped_lora
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprobs import linear_logprobs
from .lora_backward_a import lora_backward_a
from .lora_backward_b import lora_backward_b
from .lora_expand import lora_expand
from .lora_shrink import lora_shrink
from .matmul_invariant import matmul_invariant
from .merge_attention import merge_attention
from .nf4_dequantize import nf4_dequantize
from .nf4_quantize import nf4_quantize
from .paged_decode import paged_decode
from .prefix_attention import prefix_attention
from .rms_norm import rms_norm
from .rope import rope
from .rope_kv_write import rope_kv_write
from .sample import sample
from .token_logprobs import token_logprobs

__all__ = [
    "Segments",
    "adamw",
    "choose_backend",
    "gated",
    "grouped_lora",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_backward_a",
    "lora_backward_b",
    "lora_expand",
    "lora_shrink",
    "matmul_invariant",
    "merge_attention",
    "nf4_dequantize",
    "nf4_quantize",
    "paged_decode",
    "prefix_attention",
    "rms_norm",
    "rope",
    "rope_kv_write",
    "sample",
    "token_logprobs",
    "varlen_attention",
]
