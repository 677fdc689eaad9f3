"""A run that is interrupted anywhere and run again ends as one that was not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit import comparable
from fastsafe.audit import run as runs
from fastsafe.audit.run import execute
from fastsafe.audit.sources.files import FilesSource
from fastsafe.audit.stages import generate, judge, train
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import StoreError
from fastsafe.io.digest import file_sha256
from fastsafe_testing import fake_model as fake

TABLES = (
    *("planned", "prompts", "adapters", "losses", "drift"),
    *("completions", "judgements", "utility"),
)


COMMITS = 40  # of an unbroken run; one fewer and it would not end


class Crash(BaseException):
    """Stands for whatever ends a process."""


def small_steps(patch: pytest.MonkeyPatch) -> None:
    """Commit often, ask in small chunks, and leave out the drawing, which has its own tests."""

    def without_pages(run_dir: Path, store: Store, show_completions: bool) -> runs.Run:
        results = runs.make_results(store, store.meta("finished_at"))
        (run_dir / runs.RESULTS).write_text(json.dumps(results))
        return runs.Run(run_dir, results)

    patch.setattr(generate, "CHUNK_ROWS", 50)
    for module in (generate, judge):
        patch.setattr(module, "COMMIT_ROWS", 20)
    patch.setattr(generate, "COMMIT_EVERY_S", float("inf"))
    patch.setattr(runs, "_report", without_pages)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)


def content(run_dir: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on interruptions."""
    store = Store(run_dir / NAME, read_only=True)
    tables = {name: sorted(store._all(f"SELECT * FROM {name}"), key=repr) for name in TABLES}
    store.close()
    adapters = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted((run_dir / "adapters").rglob("*"))
        if path.is_file()
    }
    results = json.loads((run_dir / runs.RESULTS).read_text())
    return {"tables": tables, "adapters": adapters, "results": comparable(results)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        crash_at(patch, Store, "_commit", COMMITS)
        fake.small_run(run_dir)
    return content(run_dir)


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the n-th call of a function end the process, before or in place of its effect."""
    original = getattr(owner, name)
    left = call

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash(name)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("commit", range(0, COMMITS, 4))
def test_a_crash_at_any_commit_changes_nothing(
    tmp_path: Path, unbroken: dict[str, Any], commit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, Store, "_commit", commit)
        with pytest.raises(Crash):
            fake.small_run(tmp_path / "run")
    fake.small_run(tmp_path / "run")
    assert content(tmp_path / "run") == unbroken


@pytest.mark.parametrize("publication", range(4))
def test_a_crash_at_any_adapter_changes_nothing(
    tmp_path: Path, unbroken: dict[str, Any], publication: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, train, "_published", publication)
        with pytest.raises(Crash):
            fake.small_run(tmp_path / "run")
    fake.small_run(tmp_path / "run")
    assert content(tmp_path / "run") == unbroken


def test_many_crashes_in_a_row_still_arrive(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    crashes = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, Store, "_commit", 3)
            try:
                fake.small_run(tmp_path / "run")
                break
            except Crash:
                crashes += 1
    assert crashes > COMMITS / 4
    assert content(tmp_path / "run") == unbroken


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    again = fake.FakeBackend()
    fake.small_run(tmp_path / "run", again)
    assert (again.trained, again.asked) == ([], 0)


@pytest.mark.parametrize("damage", ["missing", "half-written", "changed"])
def test_a_damaged_adapter_is_trained_again_with_its_wave(
    tmp_path: Path, unbroken: dict[str, Any], damage: str
) -> None:
    fake.small_run(tmp_path / "run")
    folder = tmp_path / "run" / "adapters" / "code+plain"
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "half-written":
        (folder / "adapter_config.json").unlink()
    else:
        (folder / "adapter_model.safetensors").write_bytes(b"other")
    runtime = fake.FakeBackend()
    fake.small_run(tmp_path / "run", runtime)
    assert runtime.trained == ["code+none", "code+plain", "translation+none"]
    assert runtime.asked == 0
    assert content(tmp_path / "run") == unbroken


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    run_dir = tmp_path / "run"
    left = [run_dir / name / ".tmp-code+none-0123" for name in ("adapters", "exports", ".")]
    for folder in left:
        folder.mkdir(parents=True)
    fake.small_run(run_dir)
    assert not any(folder.exists() for folder in left)


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(StoreError) as caught:
        fake.small_run(tmp_path / "run", seed=3, behaviours=5)
    message = str(caught.value)
    assert "behaviours: 6 -> 5; seed: 0 -> 3" in message
    assert "--no-resume" in message
    assert content(tmp_path / "run") == before


def test_a_changed_file_of_data_is_named(tmp_path: Path) -> None:
    file = tmp_path / "behaviours.csv"
    rows = [f"b{i},how to do {i},how to see {i}" for i in range(20)]
    header = "behavior_id,harmful,benign\n"
    file.write_text(header + "\n".join(rows) + "\n")
    recipe = fake.small_recipe(
        source="files",
        data={"behaviours": str(file)},
        tasks=["code"],
        formats=["plain"],
        behaviours=20,
        utility_rows=0,
        mitigations=["none"],
    )

    def again() -> fake.FakeBackend:
        backend = fake.FakeBackend()
        execute(fake.plan_of(recipe, backend, FilesSource(recipe.data)), backend, tmp_path / "run")
        return backend

    again()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data_sha256"] == {"data.behaviours": file_sha256(file)}
    file.write_text(header + "\n".join(rows).replace("how to do", "how to make") + "\n")
    with pytest.raises(StoreError, match=r"\(the file of data.behaviours has changed\)"):
        again()
    file.write_text(header + "\n".join(rows) + "\n")
    resumed = again()
    assert (resumed.trained, resumed.asked) == ([], 0)


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    with pytest.raises(StoreError, match='checkpoint_sha256: "fake" -> "other"'):
        fake.small_run(tmp_path / "run", fake.FakeBackend("other"))


def test_settings_that_change_no_row_are_taken(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    again = fake.FakeBackend()
    run = fake.small_run(tmp_path / "run", again, thresholds={"coverage": 0.5}, wave_size=2)
    assert run.results["run"]["coverage_threshold"] == 0.5
    assert again.asked == 0


def test_the_manifest_is_written_once_and_then_revised(tmp_path: Path) -> None:
    path = tmp_path / "run" / "manifest.json"
    fake.small_run(tmp_path / "run")
    first = path.read_bytes()
    fake.small_run(tmp_path / "run")
    assert path.read_bytes() == first
    for _ in range(2):
        fake.small_run(tmp_path / "run", thresholds={"coverage": 0.5})
    fake.small_run(tmp_path / "run")
    before, after = json.loads(first), json.loads(path.read_text())
    assert after | {"revisions": []} == before
    assert [r["recipe"]["thresholds"]["coverage"] for r in after["revisions"]] == [0.5, 0.95]
    assert all(set(r) == {"at", "recipe"} for r in after["revisions"])


def test_no_resume_starts_over_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    fake.small_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    runtime = fake.FakeBackend()
    run = execute(fake.small_plan(runtime, seed=5), runtime, tmp_path / "run", resume=False)
    assert run.results["run"]["seed"] == 5
    assert len(runtime.trained) == 4
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "name", ["manifest.json", "results.json", "report.html", NAME, f"{NAME}-wal", f"{NAME}-journal"]
)
def test_a_crash_while_starting_over_leaves_a_run(
    tmp_path: Path, unbroken: dict[str, Any], name: str, resume: bool
) -> None:
    fake.small_run(tmp_path / "run")
    unlink = Path.unlink

    def broken(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise Crash(name)
        unlink(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", broken)
        with pytest.raises(Crash):
            execute(
                fake.small_plan(fake.FakeBackend()),
                fake.FakeBackend(),
                tmp_path / "run",
                resume=False,
            )
    assert not (tmp_path / "run" / "adapters").exists()
    for log in ("wal", "journal"):
        (tmp_path / "run" / f"{NAME}-{log}").write_bytes(b"torn")
    runtime = fake.FakeBackend()
    execute(fake.small_plan(runtime), runtime, tmp_path / "run", resume=resume)
    assert content(tmp_path / "run") == unbroken


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no run"):
        fake.small_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StoreError, match="is a file, expected a folder"):
        fake.small_run(tmp_path / "run")


def test_a_model_that_cannot_be_loaded_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_at(monkeypatch, fake.FakeBackend, "load", 0)
    with pytest.raises(Crash):
        fake.small_run(tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_without_finite_logits_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = fake._answer

    def broken(weights: bytes, request: Any) -> Any:
        made = reply(weights, request)
        return made if weights else made._replace(finish_reason="error")

    monkeypatch.setattr(fake, "_answer", broken)
    run = fake.small_run(tmp_path / "run")
    base = [cell for cell in run.results["cells"] if cell["condition"] == "base"]
    assert all((c["n"], c["n_scored"], c["answer_rate"]) == (6, 0, None) for c in base)
    tuned = [cell for cell in run.results["cells"] if cell["condition"] != "base"]
    assert all(c["n_scored"] == 6 and c["delta"] is None and c["n_pairs"] == 0 for c in tuned)
    scored = {(r["condition"] == "base", r["n"], r["n_scored"]) for r in run.results["utility"]}
    assert scored == {(True, 3, 0), (False, 3, 3)}
    assert all(row["delta"] is None for row in run.results["utility"])
    assert not run.is_covered
