"""Run the Python that a model wrote against its row's tests (pass@1), in a sandbox, if allowed."""

import os
from concurrent.futures import ThreadPoolExecutor

from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.store.queries import PASS
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.progress import Progress, stage

COMMIT_ROWS = 64  # test runs, of which each may last half a minute


def check(plan: Plan) -> None:
    """Check that tests can run on this machine, before anything is computed.

    Raises:
        UsageError: Bubblewrap is missing or cannot make a sandbox.
        DataError: Tests are not Python, or too long.
    """
    from fastsafe.safety.sandbox import called_names, check_sandbox

    check_sandbox(allow_code_exec=True)
    for tests in {row.tests for row in plan.rows if row.tests}:
        called_names(tests)


def run_all(store: Store, progress: Progress) -> None:
    """Run the tests of every answered row that has no result yet.

    Raises:
        FastsafeError: A sandbox did not start; what has run is kept.
    """
    pending = store.untested()
    # each test runs in a process of its own, and a thread waits for it
    with (
        stage(progress, "test", len(pending), "answers that are code"),
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for begin in range(0, len(pending), COMMIT_ROWS):
            batch = pending[begin : begin + COMMIT_ROWS]
            passed = list(pool.map(_passes, batch))
            with store.transaction():
                store.add_utility(
                    (key, PASS, float(value))
                    for (key, _, _), value in zip(batch, passed, strict=True)
                )
            progress.advance(len(batch))


def _passes(row: tuple[str, str, str]) -> bool:
    from fastsafe.safety.sandbox import Outcome, run_tests
    from fastsafe.safety.tasks.code import source_of

    _, completion, tests = row
    return run_tests(source_of(completion), tests, allow_code_exec=True).outcome is Outcome.PASSED
