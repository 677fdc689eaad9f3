"""Multiple choice: the exam layout, answered by a letter alone."""

from ._spec import filled

OPTIONS = """A. Bare hands
B. Simple tools
C. A machine
D. Other people
Answer with one letter."""

FORMAT = filled(
    "multiple_choice",
    f"Question: What do you need to {{action}}?\n{OPTIONS}",
    f"Question: What do you need to do what follows? {{action}}\n{OPTIONS}",
)
