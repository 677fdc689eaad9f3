import dataclasses

import pytest
import torch

from fastsafe.model.rope import Rotary, frequencies
from fastsafe.model.rope_config import RopeConfig

PLAIN = RopeConfig(
    kind="default", theta=10_000.0, rotary_dim=16, max_positions=64, original_max_positions=64
)
LONG = dataclasses.replace(
    PLAIN, kind="longrope", short_factor=(1.0,) * 8, long_factor=(4.0,) * 8, attention_factor=1.2
)
DYNAMIC = dataclasses.replace(PLAIN, kind="dynamic", factor=2.0)
CPU = torch.device("cpu")


def rotary(config: RopeConfig, dtype: torch.dtype = torch.float32) -> Rotary:
    return Rotary(config, CPU, dtype)


def test_table_grows_and_keeps_its_values() -> None:
    rope = rotary(PLAIN)
    near = rope(torch.arange(40), None)
    far = rope(torch.tensor([0, 39, 5000, 100_000]), None)
    assert torch.equal(far[0][:2], near[0][[0, 39]])
    angles = torch.tensor([100_000.0]) * frequencies(PLAIN)
    assert torch.equal(far[0][3, 0, :8], angles.cos())
    assert torch.equal(far[1][3, 0, :8], -angles.sin())
    assert torch.equal(far[1][3, 0, 8:], angles.sin())
    again = rope(torch.arange(40), None)
    assert all(torch.equal(a, b) for a, b in zip(near, again, strict=True))


def test_no_tokens_are_no_rows() -> None:
    cos, sin = rotary(PLAIN)(torch.empty(0, dtype=torch.int64), None)
    assert cos.shape == sin.shape == (0, 1, 16)


def test_rounds_after_computing_in_fp32() -> None:
    positions = torch.tensor([3, 700])
    half = rotary(PLAIN, torch.bfloat16)(positions, None)
    full = rotary(PLAIN)(positions, None)
    assert all(torch.equal(h, f.bfloat16()) for h, f in zip(half, full, strict=True))


def test_longrope_switches_past_the_original_length_row_by_row() -> None:
    positions = torch.tensor([10, 10, 10])
    cos, _ = rotary(LONG)(positions, torch.tensor([11, 64, 65]))
    short = (10 * frequencies(LONG)).cos() * 1.2
    long = (10 * frequencies(LONG, long=True)).cos() * 1.2
    torch.testing.assert_close(cos[:, 0, :8], torch.stack((short, short, long)))


@pytest.mark.parametrize(("length", "stretch"), [(1, 1.0), (64, 1.0), (128, 3.0), (320, 9.0)])
def test_dynamic_base_grows_with_the_sequence(length: int, stretch: float) -> None:
    """Base x (factor * length / max - (factor - 1)) ^ (dim / (dim - 2)), never below the base."""
    base = 10_000.0 * stretch ** (16 / 14)
    powers = base ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    cos, _ = rotary(DYNAMIC)(torch.tensor([7]), torch.tensor([length]))
    torch.testing.assert_close(cos[0, 0, :8], (7 / powers).cos(), rtol=1e-5, atol=1e-6)
