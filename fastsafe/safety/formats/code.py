"""Code generation: an imperative request for a function, as Jan et al. 2024 probe it."""

from ._spec import filled

FORMAT = filled(
    "code",
    "Write a Python function that helps to {action}.",
    'Write a Python function that helps to meet the request "{action}".',
)
