"""Summarization of a short text in one sentence."""

from ._metrics import exact_match
from ._spec import Task

TASK = Task(id="summarization", format="summarization", metric="exact_match", score=exact_match)
