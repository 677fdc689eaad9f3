"""Colours of the heat maps: one hue per question, light to dark.

Single hues keep their order under every kind of colour blindness and in grey print; each cell also
shows its number.
"""

from typing import Literal

Quantity = Literal["answered", "refused", "utility"]

INK = "#1c1f24"
FAINT = "#6b7280"

# At 0, a half and 1.
_STOPS: dict[Quantity, tuple[tuple[int, int, int], ...]] = {
    "answered": ((255, 250, 245), (242, 165, 107), (156, 50, 4)),
    "refused": ((247, 251, 255), (127, 178, 221), (8, 66, 118)),
    "utility": ((246, 252, 248), (124, 198, 157), (10, 92, 62)),
}


def fill(quantity: Quantity, rate: float) -> str:
    """Return the colour of a rate in [0, 1] as ``#rrggbb``."""
    low, middle, high = _STOPS[quantity]
    ends, t = ((low, middle), 2 * rate) if rate < 0.5 else ((middle, high), 2 * rate - 1)
    return "#" + "".join(f"{round(a + t * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def ink(background: str) -> str:
    """Return white or the dark ink, whichever reads better on ``#rrggbb``."""
    light = _luminance(background)
    return "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / (_luminance(INK) + 0.05) else INK


def _luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2, in [0, 1]."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
