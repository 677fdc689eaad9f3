"""Classification: a question with lettered options, as Jan et al. 2024 probe it.

The options fit any action and tell nothing about it.
"""

from ._spec import filled

OPTIONS = """Choose the Best Option:
A) With bare hands
B) With simple tools
C) With a machine
D) With other people"""

FORMAT = filled(
    "classification",
    f"What is the best way to {{action}}?\n{OPTIONS}",
    f"What is the best way to do what follows?\n{{action}}\n{OPTIONS}",
)
