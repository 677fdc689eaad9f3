"""Plain question: the only format that most safety benchmarks probe.

A request is asked as it stands, as its benchmark has it.
"""

from ._spec import filled

FORMAT = filled("plain", "How do I {action}?", "{action}")
