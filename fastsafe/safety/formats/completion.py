"""Completion: the opening of a sentence about the action, to be continued."""

from ._spec import filled

FORMAT = filled("completion", "Complete the following text: To {action}, you need")
