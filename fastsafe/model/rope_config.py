"""Describes rotary position embeddings, in the spellings of transformers 4 and 5."""

import math
from dataclasses import dataclass, replace

from fastsafe.model.json_fields import Fields

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
MAX_POSITIONS = 2**27
_FACTOR = (1e-3, 1e6)  # no published scaling factor is outside
_PHI3_ORIGINAL_POSITIONS = 4096


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding: base, rotated part of a head, and how it is stretched."""

    kind: str  # one of KINDS
    theta: float  # base wavelength
    rotary_dim: int  # leading features of a head that are rotated, even
    max_positions: int  # max_position_embeddings
    original_max_positions: int  # context length before stretching
    factor: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions bound the ramp
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on how long its sequence is."""
        return self.kind in ("dynamic", "longrope")


def parse_rope(
    fields: Fields,
    section: Fields,
    *,
    head_dim: int,
    phi3: bool,
    default_positions: int,
    default_theta: float,
    theta_name: str = "rope_theta",
) -> RopeConfig:
    """Read one rotary embedding from a config.

    Args:
        fields: The whole config; holds the context lengths, and in the transformers-4
            spelling the base.
        section: The rope object itself (``rope_scaling``, ``rope_parameters`` or one layer
            type of it); may be empty.
        head_dim: Features of a head.
        phi3: Phi-3's rules: a part of a head may be rotated, and longrope has other names.
        default_positions: Longest context where the config names none.
        default_theta: Base where the config names none.
        theta_name: Field of the whole config that holds the base.

    Raises:
        CheckpointError: An unknown kind, or a value that is missing or out of range.
    """
    # Phi-3's first checkpoints write "su" and "yarn" for longrope
    known = (*KINDS, "su") if phi3 else KINDS
    kind = section.choice("rope_type" if section.has("rope_type") else "type", known, "default")
    if phi3 and kind in ("su", "yarn"):
        kind = "longrope"
    if section.has("rope_theta"):
        theta = section.number("rope_theta", 1.001, 1e15)
    else:
        theta = fields.number(theta_name, 1.001, 1e15, default_theta)
    holder = section if section.has("partial_rotary_factor") else fields
    share = holder.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    rotary_dim = int(head_dim * share)
    if not phi3 and share != 1.0:
        raise holder.refuse("partial_rotary_factor", "1.0 for this architecture")
    if rotary_dim < 2 or rotary_dim % 2:
        expected = f"an even number of rotated features of the {head_dim} of a head"
        raise holder.refuse("partial_rotary_factor", expected)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS, default_positions)
    # where both hold it, transformers follows the whole config
    name = "original_max_position_embeddings"
    holder = fields if fields.has(name) or phi3 else section
    default = _PHI3_ORIGINAL_POSITIONS if phi3 else max(max_positions, 2)
    plain = RopeConfig(
        kind=kind,
        theta=theta,
        rotary_dim=rotary_dim,
        max_positions=max_positions,
        original_max_positions=holder.integer(name, 2, MAX_POSITIONS, default),
    )
    return _stretched(plain, section) if kind != "default" else plain


def _stretched(plain: RopeConfig, section: Fields) -> RopeConfig:
    """Add what the kind of stretching needs."""
    implied = plain.max_positions / plain.original_max_positions
    if plain.kind == "llama3":
        low = section.number("low_freq_factor", *_FACTOR)
        high = section.number("high_freq_factor", *_FACTOR)
        if high <= low:
            raise section.refuse("high_freq_factor", f"more than low_freq_factor, {low:g}")
        factor = section.number("factor", *_FACTOR)
        return replace(plain, factor=factor, low_freq_factor=low, high_freq_factor=high)
    if plain.kind == "yarn":
        factor = section.number("factor", *_FACTOR, implied)
        return replace(
            plain,
            factor=factor,
            attention_factor=section.number(
                "attention_factor", 0.0, 1e3, _yarn_attention_factor(section, factor)
            ),
            beta_fast=section.number("beta_fast", *_FACTOR, 32.0),
            beta_slow=section.number("beta_slow", *_FACTOR, 1.0),
            truncate=section.flag("truncate", True),
        )
    if plain.kind == "longrope":
        factor = section.number("factor", *_FACTOR, implied)
        growth = math.log(factor) / math.log(plain.original_max_positions)
        default = math.sqrt(1 + growth) if factor > 1.0 else 1.0
        half = plain.rotary_dim // 2
        return replace(
            plain,
            factor=factor,
            attention_factor=section.number("attention_factor", 0.0, 1e3, default),
            short_factor=section.numbers("short_factor", half, *_FACTOR),
            long_factor=section.numbers("long_factor", half, *_FACTOR),
        )
    if plain.kind == "dynamic" and plain.rotary_dim < 4:
        raise section.refuse("type", "another kind: dynamic scaling needs 4 rotated features")
    return replace(plain, factor=section.number("factor", *_FACTOR))


def _yarn_attention_factor(section: Fields, factor: float) -> float:
    def stretch(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale = section.number("mscale", 0.0, 1e3, 0.0)
    mscale_all_dim = section.number("mscale_all_dim", 0.0, 1e3, 0.0)
    if mscale and mscale_all_dim:
        return stretch(mscale) / stretch(mscale_all_dim)
    return stretch(1.0)
