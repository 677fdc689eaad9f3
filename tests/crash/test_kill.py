"""Real processes that are killed or out of disk: run again, they give the unbroken result."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit import comparable
from fastsafe_testing import fake_model

CHILD = Path(fake_model.__file__)
NEVER = 10**6


def audit(run_dir: Path, commits: int) -> int:
    """Audit a fake model in a new process that dies in place of a commit."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILD), str(run_dir), str(commits)]
    return subprocess.run(command, env=environment, check=False).returncode


def results(run_dir: Path) -> dict[str, Any]:
    return comparable(json.loads((run_dir / "results.json").read_text()))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("crash") / "run"
    assert audit(run_dir, NEVER) == 0
    return results(run_dir)


# schema, plan, first and second wave, answers, judgements, utility, the end of the run
@pytest.mark.parametrize("commits", [0, 1, 3, 5, 8])
def test_killed_and_run_again(tmp_path: Path, unbroken: dict[str, Any], commits: int) -> None:
    assert audit(tmp_path / "run", commits) == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    assert audit(tmp_path / "run", NEVER) == 0
    assert results(tmp_path / "run") == unbroken
    with closing(sqlite3.connect(tmp_path / "run" / "store.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert list((tmp_path / "run" / "adapters").glob(".tmp-*")) == []


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    """No file may grow beyond 100 kB or so: the store fails as it would on a full disk."""
    child = [sys.executable, str(CHILD), str(tmp_path / "run"), str(NEVER)]
    limited = ["sh", "-c", 'ulimit -f 100 && exec "$@"', "sh", *child]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(limited, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "StoreError" in last
    assert "run the same command to resume" in last
    assert audit(tmp_path / "run", NEVER) == 0
    assert results(tmp_path / "run") == unbroken


def test_killed_again_and_again(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    for _ in range(9):
        code = audit(tmp_path / "run", 2)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert results(tmp_path / "run") == unbroken
