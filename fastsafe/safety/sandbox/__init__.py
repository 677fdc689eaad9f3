"""Runs a model's Python against a data set's tests in two bubblewrap sandboxes.

Two pipes alone connect the sandboxes. The worker's sandbox holds the model's code and calls its
functions on request; the tester's holds the tests and writes a nonce after the last assertion,
without which nothing counts as passed. The code never shares a process, a file system or a process
table with the tests: it cannot see the assertions, patch the checker, end it early or claim a pass.
It can only return values.

The price is that tests can only call top-level functions, with Python literals as arguments and
results. Code that needs a class, a file or standard input for its test counts as failed.

The sandbox is off unless the caller allows it, and an error where bubblewrap is missing or cannot
make namespaces.
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
