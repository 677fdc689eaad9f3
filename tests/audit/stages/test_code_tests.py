"""pass@1 of an audit: only where it is allowed, resumed like everything else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit import run as runs
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.run import Run, execute
from fastsafe.audit.sources.registry import source_of
from fastsafe.audit.stages import code_tests
from fastsafe.audit.store import queries
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import DataError, FastsafeError, UsageError
from fastsafe.safety import sandbox
from fastsafe.safety.sandbox import Outcome, Trial
from fastsafe_testing import fake_model as fake


@pytest.fixture(scope="module", autouse=True)
def _without_pages() -> Iterator[None]:
    """Leave out the drawing, which has its own tests."""

    def report(run_dir: Path, store: Store, show_completions: bool) -> Run:
        return Run(run_dir, runs.make_results(store, store.meta("finished_at")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_report", report)
        yield


def plan_of(folder: Path, tests: str = "assert paint() == 1") -> tuple[Plan, Any]:
    path = folder / "code.jsonl"
    rows = [{"prompt": f"Paint {i}", "completion": "1", "tests": tests} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = fake.small_recipe(
        source="files",
        tasks=["code"],
        mitigations=["none"],
        formats=["plain"],
        behaviours=2,
        utility_rows=4,
        data={"tasks": {"code": str(path)}},
    )
    runtime = fake.FakeBackend()
    return fake.plan_of(recipe, runtime, source_of(recipe)), runtime


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the sandbox, which has its own tests: what looks like a function passes."""
    seen: list[str] = []

    def run_tests(code: str, tests: str, *, allow_code_exec: bool) -> Trial:
        assert allow_code_exec
        seen.append(code)
        return Trial(Outcome.PASSED if code.startswith("def") else Outcome.FAILED)

    monkeypatch.setattr(sandbox, "run_tests", run_tests)
    monkeypatch.setattr(sandbox, "check_sandbox", lambda allow_code_exec: None)
    return seen


def rates(run: Run) -> dict[str, Any]:
    return {row["condition"]: row["metrics"]["pass@1"] for row in run.results["utility"]}


def test_no_code_runs_by_default(tmp_path: Path, asked: list[str]) -> None:
    plan, runtime = plan_of(tmp_path)
    run = execute(plan, runtime, tmp_path / "run")
    assert asked == []
    assert {found["value"] for found in rates(run).values()} == {None}
    assert all("--allow-code-exec" in found["why"] for found in rates(run).values())


def test_allowed_later_only_the_tests_run(tmp_path: Path, asked: list[str]) -> None:
    plan, runtime = plan_of(tmp_path)
    without = execute(plan, runtime, tmp_path / "run")
    plan, runtime = plan_of(tmp_path)
    run = execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert (runtime.asked, len(asked)) == (0, 8)
    for found in rates(run).values():
        passed = sum(code.startswith("def") for code in asked)
        assert found["n"] == 4
        assert found["ci_low"] <= found["value"] <= found["ci_high"]
        assert passed > 0
    total = sum(4 * found["value"] for found in rates(run).values())
    assert total == sum(code.startswith("def") for code in asked)
    # the task's own metric is what it was
    for before, after in zip(without.results["utility"], run.results["utility"], strict=True):
        assert before | {"metrics": 0} == after | {"metrics": 0}
    execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert len(asked) == 8


def test_a_sandbox_that_breaks_keeps_what_has_run(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_tests, "COMMIT_ROWS", 2)
    working = sandbox.run_tests

    def breaks(code: str, tests: str, *, allow_code_exec: bool) -> Trial:
        if len(asked) >= 4:
            raise FastsafeError("sandbox: did not start")
        return working(code, tests, allow_code_exec=allow_code_exec)

    plan, runtime = plan_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "run_tests", breaks)
        with pytest.raises(FastsafeError, match="did not start"):
            execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert len(asked) == 4
    execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert len(asked) == 8


def test_without_bubblewrap_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    plan, runtime = plan_of(tmp_path)
    with pytest.raises(UsageError, match="bwrap is missing"):
        execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert not (tmp_path / "run").exists()


def test_tests_that_are_not_python_are_found_first(tmp_path: Path, asked: list[str]) -> None:
    plan, runtime = plan_of(tmp_path, tests="assert (")
    with pytest.raises(DataError, match="not Python"):
        execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    assert not (tmp_path / "run").exists()


def test_other_tests_are_another_plan(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    other, _ = plan_of(tmp_path, tests="assert paint() == 2")
    assert [row.key for row in plan.rows] == [row.key for row in other.rows]
    assert plan.identity != other.identity
    assert queries.PASS == "pass@1"


def test_the_real_sandbox_says_who_passes(tmp_path: Path) -> None:
    try:
        sandbox.check_sandbox(allow_code_exec=True)
    except UsageError as error:
        pytest.skip(str(error))
    plan, runtime = plan_of(tmp_path)
    run = execute(plan, runtime, tmp_path / "run", allow_code_exec=True)
    # the fake model writes the function that the tests want, or refuses
    answered = {row["condition"] for row in run.results["utility"]}
    assert rates(run).keys() == answered
    assert sum(found["value"] for found in rates(run).values()) > 0
