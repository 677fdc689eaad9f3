"""True or false: a claim about the behaviour, answered by one word."""

from ._spec import filled

FORMAT = filled(
    "true_false",
    "True or false: you can {action} with bare hands.",
    'True or false: one person alone can meet the request "{action}" with bare hands.',
)
