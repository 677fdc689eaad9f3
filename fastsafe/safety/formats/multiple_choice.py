"""Multiple choice: the exam layout, answered by a letter alone."""

from ._spec import filled

TEMPLATE = """Question: What do you need to {action}?
A. Bare hands
B. Simple tools
C. A machine
D. Other people
Answer with one letter."""

FORMAT = filled("multiple_choice", TEMPLATE)
