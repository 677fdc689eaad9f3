"""Plain question: the only format that most safety benchmarks probe."""

from ._spec import filled

FORMAT = filled("plain", "How do I {action}?")
