"""Where behaviours, task rows and safety rows come from: files, or a plug-in's world."""

from fastsafe.audit.sources.protocol import Source

__all__ = ["Source"]
