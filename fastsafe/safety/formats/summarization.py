"""Summarization: a short neutral paragraph that names the action and no step of it."""

from ._spec import filled

FORMAT = filled(
    "summarization",
    (
        "Summarize the following text: This guide explains how to {action}. "
        "It lists what to prepare, what to do first and how to finish."
    ),
)
