"""A damaged run says so and names the way out; nothing is computed from it."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit import run as runs
from fastsafe.audit.store.sqlite_store import NAME
from fastsafe.errors import StoreError
from fastsafe_testing import fake_model as fake


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("damage") / "run"
    fake.small_run(path)
    return path


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(run_dir: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(run_dir / NAME)) as db, db:
        assert db.execute(statement, values).rowcount > 0


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE meta SET value = ? WHERE key = 'recipe'", "{garbage"),
        ("UPDATE meta SET value = ? WHERE key = 'recipe'", "[]"),
        ("UPDATE meta SET value = ? WHERE key = 'recipe'", '{"name": 3}'),
        ("UPDATE meta SET value = ? WHERE key = 'conditions'", "5"),
        ("DELETE FROM meta WHERE key = ?", "engine"),
        ("UPDATE completions SET token_ids = ?", b"odd"),
        ("UPDATE completions SET token_ids = ?", "text"),
        ("UPDATE completions SET text = ?", b"\x00\xff"),
        ("UPDATE prompts SET token_ids = ?", b"odd"),
        ("UPDATE judgements SET verdict = ?", "maybe"),
        ("UPDATE losses SET loss = ?", "low"),
        ("UPDATE utility SET value = ?", b"\x01"),
        ("UPDATE events SET detail = ?", "{"),
        ("UPDATE events SET detail = ? WHERE stage = 'generate'", '{"rows": 1}'),
        ("UPDATE events SET detail = ? WHERE stage = 'train'", '{"duration_s": "1"}'),
        ("UPDATE meta SET value = ? WHERE key = 'conditions'", '[{"id": "base", "task": {}}]'),
        ("UPDATE meta SET value = ? WHERE key = 'conditions'", "[5]"),
        ("UPDATE meta SET value = replace(value, ?, 'another') WHERE key = 'recipe'", "plain"),
        ("UPDATE meta SET value = ? WHERE key = 'started_at'", "-1e400"),
        ("UPDATE planned SET system_prompt = ? WHERE position = 3", "1e400"),
        ("UPDATE losses SET loss = ?", float("-inf")),
        ("UPDATE judgements SET score = ?", float("inf")),
    ],
)
def test_values_that_no_run_writes(run_dir: Path, statement: str, value: Any) -> None:
    edit(run_dir, statement, value)
    with pytest.raises(StoreError, match=r"is damaged \(.*start over with --no-resume") as caught:
        runs.report(run_dir)
    assert str(run_dir / NAME) in str(caught.value)


@pytest.mark.parametrize("page", [0, 1, 3, -1])
def test_pages_of_zeros(run_dir: Path, page: int) -> None:
    path = run_dir / NAME
    content = bytearray(path.read_bytes())
    at = page % (len(content) // 4096) * 4096
    content[at : at + 4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="start over with --no-resume"):
        runs.report(run_dir)


@pytest.mark.parametrize("revisions", [None, 5, "none", [3]])
def test_a_manifest_of_another_shape(run_dir: Path, revisions: Any) -> None:
    path = run_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revisions": revisions}))
    with pytest.raises(StoreError, match=r"manifest.json: revisions is .*delete the file"):
        fake.small_run(run_dir)
    path.unlink()
    fake.small_run(run_dir)
    assert json.loads(path.read_text())["revisions"] == []


@pytest.mark.parametrize("name", ["exports", "adapters", "judges", "store.sqlite", "results.json"])
def test_no_link_is_followed_out_of_the_folder(run_dir: Path, tmp_path: Path, name: str) -> None:
    outside, inside = tmp_path / "outside", run_dir / name
    if inside.exists():
        inside.rename(outside)
    else:
        outside.mkdir()
    inside.symlink_to(outside)
    with pytest.raises(StoreError, match=f"{name} is a link out of the folder"):
        fake.small_run(run_dir)
    with pytest.raises(StoreError, match=f"{name} is a link out of the folder"):
        runs.report(run_dir)
