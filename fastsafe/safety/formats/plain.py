"""Plain question: the only format that most safety benchmarks probe.

A whole request is used verbatim, in its benchmark's wording.
"""

from ._spec import filled

FORMAT = filled("plain", "How do I {action}?", "{action}")
