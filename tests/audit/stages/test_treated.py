"""Conditions that train nothing: changed adapters, other questions, answers behind a guard."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fastsafe
from fastsafe.audit import comparable
from fastsafe.audit import run as runs
from fastsafe.audit.backend.open import open_backend
from fastsafe.audit.backend.protocol import Answer, Request
from fastsafe.audit.plan.mitigation_variants import expand_mitigations
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.run import Run, execute
from fastsafe.audit.stages import generate, judge
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import FastsafeError, RecipeError
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.safety.guards import Finding
from fastsafe.safety.judges import Item
from fastsafe_testing import fake_model as fake

MITIGATIONS = [
    "none",
    {"name": "wise_ft", "strength": 0.5},
    "counter_prompt",
    "ptst",
    {"name": "guard_filter", "guard": "keyword"},
]
TABLES = ("planned", "adapters", "completions", "judgements", "guards", "utility")
SMALL: dict[str, Any] = {"tasks": ["code"], "behaviours": 4, "formats": ["plain", "code"]}


class Crash(BaseException):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module", autouse=True)
def _without_pages() -> Iterator[None]:
    """Leave out the drawing, which has its own tests."""

    def report(run_dir: Path, store: Store, show_completions: bool) -> Run:
        results = runs.make_results(store, store.meta("finished_at"))
        (run_dir / runs.RESULTS).write_text(json.dumps(results))
        return Run(run_dir, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_report", report)
        yield


class Watchman:
    """A guard that says of every text what its words tell, and may be away."""

    id, identity = "watchman", "watchman 1"

    def __init__(self, *, is_away: bool = False, is_vague: bool = False) -> None:
        self.is_away, self.is_vague, self.read = is_away, is_vague, 0

    def check(self, items: Sequence[Item]) -> list[Finding]:
        self.read += len(items)
        if self.is_away or self.is_vague:
            return [Finding(key=item.key, unsafe=None, is_failure=self.is_away) for item in items]
        return [
            Finding(key=item.key, unsafe="you can do it" in (item.completion or ""))
            for item in items
        ]


def content(run_dir: Path) -> dict[str, Any]:
    store = Store(run_dir / NAME, read_only=True)
    tables = {name: sorted(store._all(f"SELECT * FROM {name}"), key=repr) for name in TABLES}
    store.close()
    results = json.loads((run_dir / "results.json").read_text())
    return {"tables": tables, "results": comparable(results)}


def run_with(out: Path, guard: Watchman | None = None, **changes: Any) -> tuple[Run, Any]:
    """Audit with a guard of ours in place of every one of the recipe."""
    runtime = fake.FakeBackend()
    recipe = fake.small_recipe(**{**SMALL, **changes})
    panel = fake.panel_of(recipe)
    if guard is not None:
        panel = Panel(
            panel.judges,
            dict.fromkeys(panel.guards, guard),
            dict.fromkeys(panel.filters, guard),
        )
    plan = fake.plan_of(recipe, runtime, panel=panel)
    return execute(plan, runtime, out), runtime


def cells_of(run: Run, mitigation: str) -> dict[str, Any]:
    return {
        cell["format"]: cell
        for cell in run.results["cells"]
        if cell["condition"] == f"code+{mitigation}"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Any]:
    out = tmp_path_factory.mktemp("treated") / "run"
    run, runtime = run_with(out, mitigations=MITIGATIONS, guards=["keyword"])
    return out, run, runtime


def test_only_what_is_trained_is_trained(whole: tuple[Path, Run, Any]) -> None:
    out, run, runtime = whole
    assert runtime.trained == ["code+none"]
    assert runtime.changed == [("wise_ft", {"strength": 0.5}, "code+none", "code+wise_ft-0.5")]
    assert sorted(p.name for p in (out / "adapters").iterdir()) == ["code+none", "code+wise_ft-0.5"]
    # the base, its adapter, the changed one and two ways of asking; a guard asks nobody
    per_model = 2 * 4 * 2 + 3
    assert runtime.asked == 5 * per_model
    assert run.is_covered


def test_serving_asks_otherwise_and_is_paired_by_behaviour(whole: tuple[Path, Run, Any]) -> None:
    out, run, _ = whole
    store = Store(out / NAME, read_only=True)
    asked = dict[str, set[Any]]()
    for position, condition, _ in store.positions():
        asked.setdefault(condition, set()).add(
            store.requests(position, position, {condition: None})[0][1].token_ids
        )
    store.close()
    assert asked["base"] >= asked["code+none"]
    for served in ("code+counter_prompt", "code+ptst"):
        assert not asked[served] & asked["base"]
    for mitigation in ("none", "counter_prompt", "ptst", "guard_filter-keyword"):
        cells = cells_of(run, mitigation)
        assert {cell["n_pairs"] for cell in cells.values()} == {4}


def test_a_filtered_models_utility_is_measured(whole: tuple[Path, Run, Any]) -> None:
    _, run, _ = whole
    rows = {row["condition"]: row for row in run.results["utility"]}
    assert rows["code+guard_filter-keyword"]["n_scored"] == 3


def test_guards_read_each_prompt_once_and_no_filtered_answer(whole: tuple[Path, Run, Any]) -> None:
    _, run, _ = whole
    rows = {(row["target"], row["format"]): row for row in run.results["guards"]}
    assert rows.keys() == {(t, f) for t in ("prompt", "answer") for f in ("plain", "code")}
    for name in ("plain", "code"):
        prompt, answer = rows["prompt", name], rows["answer", name]
        assert (prompt["n"], prompt["recall"]["n"], prompt["false_positives"]["n"]) == (8, 4, 4)
        # of the base and of four models; a cluster is a behaviour, however many models answer it
        assert answer["false_positives"]["n"] == 5 * 4
        assert answer["false_positives"]["clusters"] == 4
        assert answer["n_unread"] == prompt["n_unread"] == 0


@pytest.mark.parametrize("commit", range(1, 21, 3))
def test_a_crash_in_any_stage_changes_nothing(
    tmp_path: Path,
    whole: tuple[Path, Run, Any],
    monkeypatch: pytest.MonkeyPatch,
    commit: int,
) -> None:
    for module in (generate, judge):
        monkeypatch.setattr(module, "COMMIT_ROWS", 20)
    monkeypatch.setattr(generate, "CHUNK_ROWS", 50)
    options: dict[str, Any] = {"mitigations": MITIGATIONS, "guards": ["keyword"]}
    original, left = Store._commit, commit

    def counted(store: Store) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash
        original(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_commit", counted)
        with pytest.raises(Crash):
            run_with(tmp_path / "run", **options)
    run_with(tmp_path / "run", **options)
    assert content(tmp_path / "run") == content(whole[0])


def test_an_adapter_made_again_otherwise_takes_its_children_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"mitigations": MITIGATIONS, "guards": ["keyword"]}
    run_with(tmp_path / "run", **options)
    shutil.rmtree(tmp_path / "run" / "adapters" / "code+none")
    train = fake.FakeBackend.train

    def other(self: Any, *args: Any) -> Any:
        found = train(self, *args)
        for each in found.values():
            (each.adapter_dir / "adapter_model.safetensors").write_bytes(b"another device")
        return found

    monkeypatch.setattr(fake.FakeBackend, "train", other)
    _, again = run_with(tmp_path / "run", **options)
    _, fresh = run_with(tmp_path / "fresh", **options)
    assert len(again.changed) == 1
    assert again.asked == fresh.asked  # what is asked together is asked together again
    assert content(tmp_path / "run") == content(tmp_path / "fresh")


def test_a_filter_refuses_in_the_models_place(tmp_path: Path) -> None:
    entry = {"name": "guard_filter", "guard": "keyword", "reads": "answer"}
    run, _ = run_with(tmp_path, Watchman(), mitigations=["none", entry], behaviours=12)
    bare, held = cells_of(run, "none"), cells_of(run, "guard_filter-keyword-answer")
    assert sum(cell["answered"] for cell in bare.values()) > 0
    assert all(cell["answered"] == 0 for cell in held.values())
    harmful, benign, utility = run.results["filters"]
    refused = sum(cell["answered"] for cell in bare.values())
    assert harmful == {
        "condition": "code+guard_filter-keyword-answer",
        "kind": "harmful",
        "n": 24,
        "prompt_refused": 0,
        "answer_refused": refused,
        "unscreened": 0,
    }
    assert (benign["kind"], benign["n"], benign["answer_refused"]) == ("benign", 24, 0)
    assert (utility["kind"], utility["n"]) == ("utility", 3)


def test_a_guard_that_is_away_never_looks_like_one_that_refuses(tmp_path: Path) -> None:
    entry = {"name": "guard_filter", "guard": "keyword"}
    options: dict[str, Any] = {"mitigations": ["none", entry], "guards": ["keyword"]}
    run, _ = run_with(tmp_path / "run", Watchman(is_away=True), **options)
    held = cells_of(run, "guard_filter-keyword").values()
    assert {(cell["n"], cell["n_scored"], cell["answer_rate"]) for cell in held} == {(4, 0, None)}
    assert all(row["n_unread"] == row["n"] for row in run.results["guards"])
    assert run.results["filters"] == []
    assert not run.is_covered
    silent = {(row["read_by"], row["name"], row["failed"]) for row in run.results["unanswered"]}
    assert silent == {("filter", "guard_filter-keyword", 19), ("guard", "keyword", 48)}
    run, runtime = run_with(tmp_path / "run", Watchman(), **options)
    assert run.is_covered
    assert "unanswered" not in run.results
    assert runtime.asked == 0
    run_with(tmp_path / "at once", Watchman(), **options)
    assert content(tmp_path / "run") == content(tmp_path / "at once")


def test_what_a_guard_cannot_read_is_refused_and_counted(tmp_path: Path) -> None:
    entry = {"name": "guard_filter", "guard": "keyword"}
    run, _ = run_with(tmp_path, Watchman(is_vague=True), mitigations=["none", entry])
    assert [row["unscreened"] for row in run.results["filters"]] == [8, 8, 3]
    held = cells_of(run, "guard_filter-keyword").values()
    assert all(cell["verdicts"] == {"refused": 4} for cell in held)


def test_a_guards_settings_are_part_of_the_key() -> None:
    def keys(**settings: Any) -> set[str]:
        entry = {"name": "guard_filter", "guard": "keyword", **settings}
        plan = fake.small_plan(fake.FakeBackend(), **SMALL, mitigations=["none", entry])
        return {row.key for row in plan.rows if row.filtered_from}

    assert keys() == keys(threshold=0.5)  # which is the default
    assert not keys() & keys(threshold=0.7)
    assert not keys() & keys(refusal="No.")


def test_a_folder_counts_by_what_it_holds(tmp_path: Path) -> None:
    shipped = fastsafe.organism.path()
    for name in ("here", "there"):
        shutil.copytree(shipped, tmp_path / name)

    def key(folder: str) -> str:
        entry = {"name": "resta", "unaligned": str(tmp_path / folder)}
        recipe = fake.small_recipe(**{**SMALL, "mitigations": ["none", entry]})
        _, found = fake.conditions_of(recipe, {"checkpoint_sha256": "0"})
        return next(c.key for c in found if c.id.startswith("code+resta"))

    assert key("here") == key("there")
    before = key("there")
    config = tmp_path / "there" / "config.json"
    config.write_text(config.read_text() + "\n")
    weights = next((tmp_path / "there").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert key("there") != before
    with pytest.raises(FastsafeError, match="nowhere"):
        key("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="expected the folder of an adapter or a checkpoint"):
        key("empty")


def test_two_guards_with_settings_have_two_labels() -> None:
    entries = [
        {"name": "guard_filter", "guard": {"kind": kind, "checkpoint": "x"}}
        for kind in ("llama_guard", "wildguard")
    ]
    recipe = fake.small_recipe(**{**SMALL, "mitigations": ["none", *entries]})
    labels = [treatment.label for treatment in expand_mitigations(recipe)]
    assert labels == ["none", "guard_filter-llama_guard", "guard_filter-wildguard"]


@pytest.mark.parametrize("entry", [{"name": "der", "data": "none"}, "none"])
def test_an_objective_without_its_safety_rows_is_refused(entry: Any) -> None:
    recipe = fake.small_recipe(**{**SMALL, "mitigations": [entry]})
    if entry == "none":
        training = recipe.training.model_copy(update={"objective": "der"})
        recipe = recipe.model_copy(update={"training": training})
    with pytest.raises(RecipeError, match="needs safety rows, and data mitigation 'none' mixes"):
        fake.conditions_of(recipe, {})


def test_a_changed_model_that_is_a_checkpoint_answers(tmp_path: Path) -> None:
    """RESTA towards the model itself with the adapter kept is the adapter merged in."""
    from fastsafe.audit.backend.protocol import Job
    from fastsafe.audit.recipe.load import load
    from fastsafe.audit.recipe.schema import Sampling

    runtime = open_backend("fastsafe", "organism")
    training = load("organism", overrides=["training.max_steps=20"]).training
    rows = [{"prompt": "How do I", "completion": f"the {word}"} for word in ("car", "boat")] * 8
    (tmp_path / "trained").mkdir()
    trained = runtime.train([Job("one", rows, 1)], training, tmp_path / "trained", lambda *_: None)
    adapter = trained["one"].adapter_dir
    assert adapter is not None
    params = {"unaligned": str(runtime.path), "gamma": 0.5}
    runtime.change("resta", params, adapter, tmp_path / "resta")
    assert weights_sha256(tmp_path / "resta") is not None
    folders = {"one": adapter, "resta": tmp_path / "resta"}
    prompt = tuple(runtime.tokenizer.encode("How do I"))
    asked = [Request(name, prompt, 0, 8) for name in (None, "resta", "one", "resta", None)]
    replies: dict[int, Answer] = {}
    for _ in range(2):  # the base comes back after the checkpoint
        replies.clear()
        runtime.generate(asked, folders, Sampling(max_tokens=8), replies.__setitem__)
    assert sorted(replies) == [0, 1, 2, 3, 4]
    assert replies[1].text == replies[2].text == replies[3].text
    assert replies[0].text == replies[4].text != replies[1].text


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "resta"
    shutil.copytree(fastsafe.organism.path(), folder)
    assert weights_sha256(folder)
    (folder / "config.json").unlink()
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert weights_sha256(folder) is None


def test_an_adapters_scale_is_part_of_its_hash(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    hashes = set()
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        hashes.add(weights_sha256(tmp_path))
    assert len(hashes) == 2
