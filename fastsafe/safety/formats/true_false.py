"""True or false: a claim about the action, answered by one word."""

from ._spec import filled

FORMAT = filled("true_false", "True or false: you can {action} with bare hands.")
