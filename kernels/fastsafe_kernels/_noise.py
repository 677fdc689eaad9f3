"""Gumbel noise as a function of (seed, position, token id), the same on every device.

    key = hash of seed and position        bits = hash of key and token id, 32 of them
    u = (bits >> 9 + 1/2) / 2^23           g = -log(-log u)

The hash is exact; only the logarithms differ between devices, by rounding.

Source   Gumbel 1954; Appleby 2011 (MurmurHash3's finalizer)
"""

import torch
from torch import Tensor

from ._triton import tl, triton


def _int32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _mix(h: Tensor) -> Tensor:
    """Scramble 32-bit values held in int32, in place."""
    h ^= (h >> 16) & 0xFFFF
    h *= _int32(0x85EBCA6B)
    h ^= (h >> 13) & 0x7FFFF
    h *= _int32(0xC2B2AE35)
    h ^= (h >> 16) & 0xFFFF
    return h


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Noise of every token in plain torch: [N] int64 and [N] int64 -> [N, V] fp32."""
    key = _mix(seeds.to(torch.int32) ^ _int32(0x9E3779B9))
    key = _mix(key ^ (seeds >> 32).to(torch.int32))
    key = _mix(key ^ positions.to(torch.int32))
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    bits = _mix(key[:, None] ^ _mix(tokens * _int32(0x9E3779B1)))
    # 23 bits, centred in their interval: exact in fp32, never 0 or 1, so the noise is finite
    u = ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


@triton.jit
def mix(h):
    """Scramble uint32 values."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_key(seed, position):
    """Hash of int64 scalars."""
    key = mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    key = mix(key ^ (seed >> 32).to(tl.uint32))
    return mix(key ^ position.to(tl.uint32))


@triton.jit
def token_key(v):
    """Hash of token ids; ``mix(row_key ^ token_key)`` gives the bits."""
    return mix(v.to(tl.uint32) * 0x9E3779B1)


@triton.jit
def uniform(bits):
    """Read bits as numbers in (0, 1); inverted bits give 1 - u exactly."""
    # 23 bits as the fraction of a number in [1, 2), less 1 - 2^-24: exact
    one_to_two = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return one_to_two - 0.999999940395355224609375


@triton.jit
def score(z, temperature, bits):
    """Logit over temperature, plus noise: the one that a draw maximises."""
    return tl.div_rn(z, temperature) - tl.log(-tl.log(uniform(bits)))
