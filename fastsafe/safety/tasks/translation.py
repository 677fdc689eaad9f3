"""Translation from French into English."""

from ._metrics import exact_match
from ._spec import Task

TASK = Task(id="translation", format="translation", metric="exact_match", score=exact_match)
