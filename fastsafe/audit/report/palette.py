"""Colours of the heat maps: one hue per question, light to dark.

Single hues keep their order under every kind of colour blindness and on a grey printer; the number
stands in each cell besides.
"""

from typing import Literal

Quantity = Literal["answered", "refused", "utility"]

INK = "#1c1f24"
FAINT = "#6b7280"

_DARK = {"answered": (179, 66, 8), "refused": (12, 84, 140), "utility": (16, 110, 76)}
_LIGHT = {"answered": (255, 250, 245), "refused": (247, 251, 255), "utility": (246, 252, 248)}


def fill(quantity: Quantity, rate: float) -> str:
    """Return the colour of a rate in [0, 1] as ``#rrggbb``."""
    ends = zip(_LIGHT[quantity], _DARK[quantity], strict=True)
    return "#" + "".join(f"{round(a + rate * (b - a)):02x}" for a, b in ends)


def ink(background: str) -> str:
    """Return white or the dark ink, whichever reads better on ``#rrggbb``."""
    light = _luminance(background)
    return "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / (_luminance(INK) + 0.05) else INK


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2, in [0, 1]."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
