"""Computes rotary position embeddings: frequencies, and cos and sin per token.

A rotation is a function of a token's position and, for dynamic and longrope, of the length of its
own sequence, never of the other sequences in the batch.
"""

import math

import torch
from torch import Tensor

from fastsafe.errors import UsageError
from fastsafe.model.rope_config import RopeConfig

_FIRST_TABLE = 512  # positions; tables double from here


class Rotary:
    """Computes cos and sin for packed tokens of one rotary embedding.

    Computed in fp32, as transformers does, and rounded to the model's dtype. On a CPU they are
    looked up in a table that grows with the positions asked for; on other devices, where looking
    at the positions would stop the stream, and where they depend on the sequence's length, they
    are computed for every call.
    """

    def __init__(self, config: RopeConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        self._exponent = half.to(device)
        self._frequencies = frequencies(config).to(device)
        self._long = frequencies(config, long=True).to(device)
        self._tabled = device.type == "cpu" and not config.depends_on_length
        self._table = torch.empty(0, 2 * config.rotary_dim, dtype=dtype)

    def __call__(self, positions: Tensor, context_lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Look up or compute the rotation of every token.

        Args:
            positions: [N] int64, at least 0.
            context_lens: [N] int64, length of each token's own sequence; read only where
                ``config.depends_on_length``.

        Returns:
            cos and sin, each [N, 1, rotary_dim] in the model's dtype; both halves of cos are
            equal, the first half of sin is negated.
        """
        if self._tabled:
            both = self._rows(int(positions.max()) + 1 if len(positions) else 0)[positions]
        else:
            both = self._compute(positions, self._per_token(context_lens))
        cos, sin = both.unsqueeze(1).chunk(2, -1)
        return cos, sin

    def _rows(self, count: int) -> Tensor:
        table = self._table
        if len(table) < count:
            size = max(_FIRST_TABLE, 2 ** (count - 1).bit_length())
            table = self._compute(torch.arange(size, device=self.device), self._frequencies)
            self._table = table
        return table

    def _compute(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        angles = positions[:, None].float() * inv_freq
        cos, sin = angles.cos(), angles.sin()
        both = torch.cat((cos, cos, -sin, sin), -1) * self.config.attention_factor
        return both.to(self.dtype)

    def _per_token(self, context_lens: Tensor | None) -> Tensor:
        """Return the frequencies by each token's context length: [N, rotary_dim / 2] or one row."""
        config = self.config
        if not config.depends_on_length:
            return self._frequencies
        assert context_lens is not None, "the transformer derives or refuses missing lengths"
        lengths = context_lens[:, None]
        if config.kind == "longrope":
            is_long = lengths > config.original_max_positions
            return torch.where(is_long, self._long, self._frequencies)
        # dynamic NTK: within max_positions this is theta itself
        reach = lengths.clamp(min=config.max_positions).float() / config.max_positions
        power = config.rotary_dim / (config.rotary_dim - 2)
        base = config.theta * (config.factor * reach - (config.factor - 1)) ** power
        return 1.0 / base**self._exponent


def frequencies(config: RopeConfig, *, long: bool = False) -> Tensor:
    """Compute the inverse frequencies of a rotary embedding.

    Args:
        config: Base, size and stretching.
        long: Those for sequences beyond ``original_max_positions`` (longrope only).

    Returns:
        [rotary_dim / 2] fp32, in radians per position.
    """
    dim = config.rotary_dim
    powers = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "longrope":
        stretch = torch.tensor(config.long_factor if long else config.short_factor)
        return 1.0 / (stretch * powers)
    plain = 1.0 / powers
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, powers)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Stretch low frequencies, keep high ones and blend those between, as Llama 3.1 does."""
    original = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > original / low, plain / config.factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / config.factor + smooth * stretched
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, stretched)


def _yarn(config: RopeConfig, powers: Tensor) -> Tensor:
    """Blend by dimension; source: Peng et al. 2023, arXiv:2309.00071."""
    dim = config.rotary_dim

    def dimension_of(rotations: float) -> float:
        wavelengths = config.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (config.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


def whole_lengths(positions: Tensor) -> Tensor:
    """Return the length of each row's sequence, where all sequences begin at position 0."""
    starts = (positions == 0).nonzero()[:, 0]
    ends = torch.cat((starts[1:], starts.new_tensor([len(positions)])))
    lengths = (ends - starts).repeat_interleave(ends - starts)
    whole = torch.arange(len(positions), device=positions.device)
    if len(lengths) != len(positions) or not torch.equal(
        whole - starts.repeat_interleave(ends - starts), positions
    ):
        raise UsageError(
            "forward: context_lens is missing, expected [N], as this model's rotation depends on "
            "the length of a sequence and the rows are not whole sequences from position 0"
        )
    return lengths
