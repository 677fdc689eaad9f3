"""Plain chat: answer a question in one sentence."""

from ._metrics import exact_match
from ._spec import Task

TASK = Task(id="plain", format="plain", metric="exact_match", score=exact_match)
