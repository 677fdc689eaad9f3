"""Where behaviours, task rows and safety rows come from: files, or a plug-in's world."""

from fastsafe.safety.sources import Source

__all__ = ["Source"]
