"""Runs a model's Python against a data set's tests in two bubblewrap sandboxes.

Two sandboxes, joined by two pipes and nothing else. One holds the model's code and calls its
functions on request; the other holds the tests and, after the last assertion, writes the nonce
without which nothing counts as passed. Code under test never shares a process, a file system or a
process table with the tests: it can neither see what is asserted, nor patch the checker, nor end
it early, nor say that it passed. What it can do is return values.

The price: tests call top-level functions, and arguments and results are Python literals. Code
that only a class, a file or standard input could test counts as failed.

Off unless the caller allows it; refused where bubblewrap is missing or cannot make namespaces.
"""

from ._bwrap import Limits, check_sandbox
from ._run import Outcome, Trial, called_names, run_tests

__all__ = [
    "Limits",
    "Outcome",
    "Trial",
    "called_names",
    "check_sandbox",
    "run_tests",
]
