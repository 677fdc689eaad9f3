"""Drift of an audit's models: what is read and kept, when training ends early, what is shown."""

import json
import re
from array import array
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe import LLM, SamplingParams
from fastsafe.audit import comparable
from fastsafe.audit.backend.drift_watch import DriftRow, Watch
from fastsafe.audit.backend.open import open_backend
from fastsafe.audit.recipe.load import load
from fastsafe.audit.recipe.schema import Drift
from fastsafe.audit.report import report_html, table_text
from fastsafe.audit.report.curves import HEIGHT, WIDTH, Scale, curves
from fastsafe.audit.run import Run, audit, prepare
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import RecipeError, StoreError, TrainingError
from fastsafe.train import DriftReading, FinetuneResult
from fastsafe_testing import fake_model as fake

EVERY_TWO = {"every": 2, "probes": 3, "refusal": "i cannot", "affirmative": "you can"}
SMALL = (
    "tasks=[code]",
    "mitigations=[none, plain]",
    "formats=[plain, code]",
    "behaviours=4",
    "benign_twins=false",
    "utility_rows=1",
    "training.rows=40",
    "training.max_steps=5",
    "sampling.max_tokens=4",
)


def small(out: Path, *more: str, **options: Any) -> Run:
    return audit("organism", out=out, overrides=[*SMALL, *more], **options)


def drift(**settings: Any) -> str:
    return f"drift={json.dumps(EVERY_TWO | settings)}"


def weights(run: Run) -> dict[str, bytes]:
    files = (run.path / "adapters").rglob("*.safetensors")
    return {file.parent.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small(tmp_path_factory.mktemp("watched") / "run", drift())


def test_reading_changes_nothing_but_the_plan(plain: Run, watched: Run) -> None:
    assert weights(plain) == weights(watched)
    assert plain.results["drift"] == []
    for name in ("conditions", "cells", "utility"):
        assert plain.results[name] == watched.results[name]
    assert plain.results["run"]["plan_sha256"] != watched.results["run"]["plan_sha256"]


def test_rows_per_model_step_and_format(watched: Run) -> None:
    rows = watched.results["drift"]
    assert [(r["condition"], r["step"], r["format"]) for r in rows] == [
        (condition, step, name)
        for condition in ("code+none", "code+plain")
        for step in (2, 4)
        for name in ("plain", "code")
    ]
    assert all(r["n"] == 3 and r["stopped"] is False and r["kl"] > 0 for r in rows)
    with closing(Store(watched.path / NAME, read_only=True)) as store:
        kept = {(name, row) for name, row in store.drift()}
    assert kept == {(r["condition"], DriftRow(**{k: r[k] for k in DriftRow._fields})) for r in rows}


def test_probes_are_the_first_that_are_asked() -> None:
    runtime = fake.FakeBackend()
    plan = fake.small_plan(runtime, drift={"every": 1, "probes": 2}, early_stop={"tokens": 3})
    assert plan.watch.formats == tuple(name for name in plan.recipe.formats for _ in range(2))
    asked = [
        plan.prompts[row.prompt].token_ids
        for name in plan.recipe.formats
        for row in [r for r in plan.rows if r.condition == "base" and r.kind == "harmful"]
        if row.part == name and row.sample == 0
    ]
    per_format = len(asked) // len(plan.recipe.formats)
    assert plan.watch.prompts == tuple(
        asked[i * per_format + n] for i in range(len(plan.recipe.formats)) for n in range(2)
    )


def test_probes_are_asked_under_the_first_system_prompt() -> None:
    runtime, settings = fake.FakeBackend(), {"every": 1, "probes": 2}
    prompts = {"kind": "be kind", "none": ""}
    plan = fake.small_plan(runtime, drift=settings, system_prompts=prompts)
    assert all(bytes(ids).startswith(b"be kind") for ids in plan.watch.prompts)
    plan = fake.small_plan(runtime, drift=settings)
    assert not any(bytes(ids).startswith(b"be kind") for ids in plan.watch.prompts)


def test_fewer_behaviours_than_probes_are_all() -> None:
    plan = fake.small_plan(fake.FakeBackend(), drift={"every": 1, "probes": 99})
    assert len(plan.watch.prompts) == 6 * len(plan.recipe.formats)


def test_behaviours_without_a_harmful_side_have_no_drift(tmp_path: Path) -> None:
    behaviours = tmp_path / "benign.jsonl"
    behaviours.write_text(json.dumps({"benign": "How do I paint the car?", "category": "x"}) + "\n")
    files = ["source=files", f"data.behaviours={behaviours}", "benign_twins=true"]
    with pytest.raises(RecipeError, match="drift reads harmful probes"):
        prepare("organism", overrides=[*SMALL, *files, drift()])


def test_only_a_stop_is_part_of_an_adapters_key() -> None:
    def keys(**settings: Any) -> list[str]:
        plan = fake.small_plan(fake.FakeBackend(), **settings)
        return [condition.key for condition in plan.conditions]

    without = keys()
    assert keys(drift={"every": 2}) == without
    stopped = keys(drift={"every": 2, "stop_above": 1.0})
    assert not set(stopped[1:]) & set(without[1:])
    assert keys(drift={"every": 2, "stop_above": 1.0, "probes": 3}) != stopped
    assert stopped[0] == without[0], "the base is not trained"
    whole = keys(training=fake.small_recipe().training.model_dump() | {"method": "full"})
    assert not set(whole[1:]) & set(without[1:])


def test_an_early_stop_is_recorded_and_resumes(tmp_path: Path, plain: Run) -> None:
    run = small(tmp_path / "run", drift(stop_above=1e-9), "training.schedule=constant")
    rows = run.results["drift"]
    assert {(r["step"], r["stopped"]) for r in rows} == {(2, True)}
    with closing(Store(run.path / NAME, read_only=True)) as store:
        assert {len(losses) for losses in store.losses().values()} == {2}
    assert weights(run) != weights(plain)
    two = small(tmp_path / "two", "training.max_steps=2")
    assert weights(run) == weights(two), "the rate is constant: stopped at 2 is trained for 2"
    again = small(tmp_path / "run", drift(stop_above=1e-9), "training.schedule=constant")
    assert comparable(again.results) == comparable(run.results)


def test_other_readings_are_refused_in_the_same_run(watched: Run) -> None:
    with pytest.raises(StoreError, match=r"drift\.every: 2 -> 1"):
        small(watched.path, drift(every=1))
    with pytest.raises(StoreError, match="drift: "):
        small(watched.path)


def test_a_killed_run_has_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after the commit of the first wave and in place of that of the second."""
    settings = {"drift": {"every": 2, "probes": 2}}
    unbroken = fake.small_run(tmp_path / "unbroken", **settings)
    original = Store._commit
    left = 4

    def counted(store: Store) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(store)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_commit", counted)
        with pytest.raises(KeyboardInterrupt):
            fake.small_run(tmp_path / "broken", **settings)
    with closing(Store(tmp_path / "broken" / NAME, read_only=True)) as store:
        assert len(store.drift()) == 3 * 2 * 3
    resumed = fake.small_run(tmp_path / "broken", **settings)
    assert resumed.results["drift"] == unbroken.results["drift"]
    assert len(resumed.results["drift"]) == 4 * 2 * 3, "conditions, readings, formats"


def test_weights_made_again_bring_their_readings(tmp_path: Path) -> None:
    settings = {"drift": {"every": 2, "probes": 2}}
    run = fake.small_run(tmp_path / "run", **settings)
    (run.path / "adapters" / "code+none" / "adapter_model.safetensors").write_bytes(b"changed")
    again = fake.small_run(tmp_path / "run", **settings)
    assert again.results["drift"] == run.results["drift"]


def test_a_failed_job_leaves_no_reading(tmp_path: Path) -> None:
    class Unlucky(fake.FakeBackend):  # type: ignore[misc, name-defined]
        def train(self, jobs: Sequence[Any], *rest: Any) -> dict[str, Any]:
            found: dict[str, Any] = super().train(jobs, *rest)
            name = jobs[0].name
            return found | {name: found[name]._replace(adapter_dir=None, error="no more")}

    with pytest.raises(TrainingError, match="no more"):
        fake.small_run(tmp_path / "run", Unlucky(), drift={"every": 2})
    with closing(Store(tmp_path / "run" / NAME, read_only=True)) as store:
        assert {name for name, _ in store.drift()} == {"code+plain", "translation+none"}


def test_rows_are_means_by_format() -> None:
    watch = Watch(Drift(every=1), ("a", "a", "b"), ((1,), (2,), (3,)))
    readings = [
        DriftReading("x", 1, 9.0, 9.0, (1.0, 3.0, 5.0), (0.0, -1.0, 4.0)),
        DriftReading("y", 1, 9.0, 9.0, (0.0,) * 3, (0.0,) * 3),
        DriftReading("x", 2, 9.0, 9.0, (2.0, 2.0, 6.0), (1.0, 1.0, 1.0)),
    ]
    for stopped in (False, True):
        result = FinetuneResult(
            name="x",
            adapter_dir=None,
            losses=(1.0, 1.0),
            num_tokens=1,
            seconds=1.0,
            stopped_early=stopped,
        )
        assert watch.rows(result, readings) == [
            DriftRow(1, "a", 2, 2.0, -0.5, False),
            DriftRow(1, "b", 1, 5.0, 4.0, False),
            DriftRow(2, "a", 2, 2.0, 1.0, stopped),
            DriftRow(2, "b", 1, 6.0, 1.0, stopped),
        ]


def test_the_backend_that_cannot_says_so() -> None:
    pytest.importorskip("peft")
    runtime = open_backend("transformers", "organism")
    for override, word in ((drift(), "drift"), ("training.method=full", "method full")):
        with pytest.raises(RecipeError, match=f"has {word}, which backend 'transformers' lacks"):
            runtime.check_training(load("organism", overrides=[override]), [])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("drift={}", "drift.every is missing, expected a value"),
        ("drift={every: 0}", "drift.every is 0, "),
        ("drift={every: 1, evry: 2}", "'evry' is not a key of drift; did you mean every"),
        ("drift={every: 1, stop_above: 0}", "drift.stop_above is 0, "),
        ("drift={every: 1, refusal: ''}", "drift.refusal is '', "),
    ],
)
def test_a_wrong_section_is_one_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        prepare("organism", overrides=[setting])


def test_page_and_table_show_the_curves(watched: Run, plain: Run) -> None:
    page = (watched.path / "report.html").read_text()
    assert page.count("<polyline") == 2 + 2 * 2 * 2, "losses, and two curves per format"
    assert "drift, code" in page
    assert "stopped early" not in page
    text = table_text(watched.results, 80)
    assert max(map(len, text.splitlines())) <= 80
    last = watched.results["drift"][2]["kl"]
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("code +none")]
    assert f"{last:.2f}" in line
    assert (plain.path / "report.html").read_text().count("<polyline") == 2
    assert "Drift" not in table_text(plain.results, 80)


def test_an_early_stop_is_shown_and_no_probe_is(watched: Run) -> None:
    results = json.loads(json.dumps(watched.results))
    for row in results["drift"]:
        row["stopped"] = row["condition"] == "code+none" and row["step"] == 4
    page = report_html(results, "<svg/>", {"code+none": [1.0] * 4, "gone": [1.0]}, [])
    assert "stopped early after 4 steps" in page
    assert "stopped, 4" in table_text(results, 100)
    assert "▁" in table_text(results, 100)
    assert "▁" in table_text(results, 60)
    with closing(Store(watched.path / NAME, read_only=True)) as store:
        texts = [text for (text,) in store._all("SELECT text FROM prompts")]
    written = (watched.path / "report.html").read_text()
    assert not any(text in written for text in texts)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_curves_stay_in_their_boxes(values: list[float]) -> None:
    scale = Scale(min(0.0, *values), max(0.0, *values))
    pairs = [point.split(",") for point in scale.points(values).split()]
    assert 1 <= len(pairs) <= WIDTH
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in pairs)
    assert [float(x) for x, _ in pairs] == sorted(float(x) for x, _ in pairs)
    assert len(scale.blocks(values, 5)) == min(5, len(values))


def test_a_curve_of_nothing_but_zeros_lies_at_the_bottom() -> None:
    assert Scale(0.0, 0.0).blocks([0.0, 0.0]) == "▁▁"
    assert Scale(0.0, 2.0).blocks([0.0, 1.0, 2.0]) == "▁▅█"
    found = curves({"conditions": [{"id": "b"}, {"id": "a"}], "drift": []}, {"a": [1.0], "b": []})
    assert list(found.losses) == ["a"]


def test_whole_weights_are_trained_kept_and_asked(tmp_path: Path, plain: Run) -> None:
    more = ("training.method=full", "training.learning_rate=0.0003", drift())
    mitigations = "mitigations=[none, plain, {name: counter_prompt}]"
    run = small(tmp_path / "run", *more, mitigations)
    folders = sorted((run.path / "adapters").iterdir())
    assert [folder.name for folder in folders] == ["code+none", "code+plain"]
    for folder in folders:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in folder.iterdir()
        }
    assert {c["preset"] for c in run.results["conditions"] if c["task"]} == {"full"}
    keys = [c["adapter_key"] for c in run.results["conditions"]]
    assert keys[:2] != [c["adapter_key"] for c in plain.results["conditions"]][:2]
    assert len({row["kl"] for row in run.results["drift"]}) == 8
    assert len(run.results["cells"]) == 4 * 2
    assert run.results["run"]["coverage"] == 1.0
    with closing(Store(run.path / NAME, read_only=True)) as store:
        rows = store._all(
            "SELECT t.token_ids, c.text FROM planned p JOIN completions c USING (key)"
            " JOIN prompts t ON t.sha256 = p.prompt"
            " WHERE p.condition = 'code+none' AND p.kind = 'harmful'"
        )
    llm = LLM(folders[0])
    answers = llm.generate([list(array("i", ids)) for ids, _ in rows], SamplingParams(max_tokens=4))
    assert [answer.text for answer in answers] == [text for _, text in rows]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["training.dropout=0.1"], "dropout is 0.1, expected 0 where method is 'full'"),
        (["mitigations=[none, {name: wise_ft}]"], "mitigation wise_ft changes an adapter"),
        (
            ["training.objective={name: freeze_layers, layers: [0]}"],
            "expected 'lora' for objective",
        ),
    ],
)
def test_what_does_not_go_with_whole_weights(more: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        prepare("organism", overrides=["training.method=full", "mitigations=[none]", *more])
