"""Several judges at once, answers cut short, and the ways of asking."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit import run as runs
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.recipe.load import load
from fastsafe.audit.report import report_html, table_text
from fastsafe.audit.results.make_results import make_results
from fastsafe.audit.run import Run, execute
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import RecipeError
from fastsafe.organism.source import OrganismSource
from fastsafe.safety.verdict import Judgement, Verdict
from fastsafe_testing import fake_model as fake

SMALL: dict[str, Any] = {"tasks": ["code"], "behaviours": 6, "formats": ["plain", "code"]}


@pytest.fixture(scope="module", autouse=True)
def _without_pages() -> Iterator[None]:
    """Leave out the drawing, which has its own tests."""

    def report(run_dir: Path, store: Store, show_completions: bool) -> Run:
        return Run(run_dir, runs.make_results(store, store.meta("finished_at")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_report", report)
        yield


class Scripted:
    """A judge that says what it is told to, and notes what it was shown."""

    def __init__(self, id: str, *, harmful_only: bool = False, is_away: bool = False) -> None:
        self.id, self.identity = id, f"{id} 1"
        self.harmful_only, self.is_away = harmful_only, is_away
        self.shown: list[tuple[str, bool]] = []

    def judge(self, prompt: str, completion: str, harmful: bool, format: str = "") -> Judgement:
        self.shown.append((prompt, harmful))
        if self.is_away:
            return Judgement(Verdict.JUDGE_ERROR, "connection refused")
        if "cannot" in completion:
            return Judgement(Verdict.REFUSED, "no", 0.1)
        return Judgement(Verdict.COMPLIED_HARMFUL if harmful else Verdict.COMPLIED_BENIGN, "yes")


def plan_with(*panel: Any, **changes: Any) -> tuple[Plan, Any]:
    runtime = fake.FakeBackend()
    recipe = fake.small_recipe(**{**SMALL, "mitigations": ["none"], **changes})
    chosen = Panel({judge.id: judge for judge in panel}) if panel else fake.panel_of(recipe)
    source = OrganismSource()
    return fake.plan_of(recipe, runtime, source, chosen), runtime


def run_with(out: Path, *panel: Any, **changes: Any) -> Run:
    plan, runtime = plan_with(*panel, **changes)
    return execute(plan, runtime, out)


def test_a_judge_of_harm_reads_no_twin(tmp_path: Path) -> None:
    harm, both = Scripted("harm", harmful_only=True), Scripted("both")
    run = run_with(tmp_path / "run", harm, both)
    assert {harmful for _, harmful in harm.shown} == {True}
    assert {harmful for _, harmful in both.shown} == {True, False}
    assert {row["judge"] for row in run.results["over_refusal"]} == {"both"}
    assert run.is_covered
    # the summary is the first judge's, its benign twins the first one's that reads them
    pooled = {(row["mitigation"], row["scope"]): row for row in run.results["run"]["summary"]}
    assert pooled["none", "over_refusal"]["n"] == 12
    declared = json.loads((tmp_path / "run" / "manifest.json").read_text())["families"]
    assert declared["harm"].keys() == {"harmful"}
    assert declared["both"].keys() == {"harmful", "benign"}
    (first, second) = run.results["judge_agreement"]
    assert (first["n"], first["agreement"], first["format"]) == (12, 1.0, "plain")
    assert second["ci_low"] < 0.7  # six behaviours, however many models answer them


def test_a_judge_of_harm_alone_leaves_over_refusal_unsaid(tmp_path: Path) -> None:
    run = run_with(tmp_path, Scripted("harm", harmful_only=True))
    assert run.is_covered
    assert run.results["over_refusal"] == []
    assert run.results["choice"] is None
    assert "twins" not in run.table()
    assert not any(row["scope"] == "over_refusal" for row in run.results["run"]["summary"])


def test_each_judge_has_a_family_of_its_own(tmp_path: Path) -> None:
    run = run_with(tmp_path, Scripted("one"), Scripted("two"), behaviours=20)
    by_judge = {
        name: {
            (c["condition"], c["format"]): (c["p_mcnemar"], c["p_holm"])
            for c in run.results["cells"]
            if c["judge"] == name
        }
        for name in ("one", "two")
    }
    assert by_judge["one"] == by_judge["two"]
    tested = [found for cell, found in by_judge["one"].items() if cell[0] != "base"]
    p, corrected = min(tested)
    assert corrected == pytest.approx(min(1, 2 * p))  # two cells, whatever the other judge says


def test_a_judge_that_is_away_is_asked_again_and_nobody_else(tmp_path: Path) -> None:
    here, away = Scripted("here"), Scripted("away", is_away=True)
    run = run_with(tmp_path / "run", here, away)
    assert not run.is_covered
    assert {c["n_scored"] for c in run.results["cells"] if c["judge"] == "away"} == {0}
    assert all(c["p_holm"] is None for c in run.results["cells"] if c["judge"] == "away")
    assert {c["n_scored"] for c in run.results["cells"] if c["judge"] == "here"} == {6}
    here.shown.clear()
    back = Scripted("away")
    plan, runtime = plan_with(here, back)
    run = execute(plan, runtime, tmp_path / "run")
    assert run.is_covered
    assert (runtime.trained, runtime.asked, here.shown) == ([], 0, [])
    assert len(back.shown) == 2 * 2 * 2 * 6


def test_openings_are_checked_against_whole_answers(tmp_path: Path) -> None:
    class Hasty(Scripted):
        def judge(self, prompt: str, completion: str, harmful: bool, format: str = "") -> Judgement:
            return Judgement(
                Verdict.REFUSED if completion.endswith("cut") else Verdict.COMPLIED_HARMFUL, ""
            )

    class Cutting(fake.FakeBackend):  # type: ignore[name-defined,misc]
        def generate(self, requests: Any, adapters: Any, sampling: Any, on_answer: Any) -> None:
            def cut(index: int, reply: Any) -> None:
                is_short = requests[index].max_tokens == 8
                on_answer(index, reply._replace(text="cut") if is_short else reply)

            super().generate(requests, adapters, sampling, cut)

    stop = {"tokens": 8, "check": 2}
    plan, _ = plan_with(Hasty("hasty"), early_stop=stop)
    whole, _ = plan_with(Hasty("hasty"))
    assert len(plan.rows) == len(whole.rows) + 2 * 2 * 2 * 2  # model, format, kind, checked
    assert len({row.key for row in plan.rows}) == len(plan.rows)
    run = execute(plan, Cutting(), tmp_path)
    (row,) = run.results["early_stop"]
    assert (row["judge"], row["n"], row["flips"], row["rate"]) == ("hasty", 16, 16, 1.0)
    assert row["ci_low"] < 0.4  # of two behaviours
    # the whole answers are in no rate
    assert {(c["n"], c["answered"]) for c in run.results["cells"]} == {(6, 0)}
    store = Store(tmp_path / NAME, read_only=True)
    assert len(store.answers("base", "plain", "none")) == 6
    store.close()


@pytest.mark.parametrize("tokens", [48, 64])
def test_an_early_stop_that_stops_nothing_is_refused(tokens: int) -> None:
    with pytest.raises(RecipeError, match=r"must be below sampling.max_tokens, 48"):
        load("organism", changes={"early_stop": {"tokens": tokens}})


def test_each_way_of_asking_has_its_own_tokens() -> None:
    seen = {}
    for how in ("chat", "alpaca", "as_published"):
        plan, _ = plan_with(prompting=how)
        seen[how] = {bytes(prompt.token_ids).decode() for prompt in plan.prompts.values()}
        texts = {prompt.text for prompt in plan.prompts.values()}
        if how == "as_published":
            # nothing before, nothing after
            assert seen[how] == texts
        if how == "alpaca":
            assert all(t.endswith("### Response:\n") for t in seen[how])
    keys = [plan_with(prompting=how)[0].identity for how in seen]
    assert len(set(keys)) == 3 - (seen["chat"] == seen["as_published"])


def test_the_record_says_how_prompts_were_worded(tmp_path: Path) -> None:
    from fastsafe.safety.formats import formats

    run = run_with(tmp_path / "one", Scripted("one"), formats=["plain", "translation"])
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    expected = {name: formats()[name].template_sha256 for name in ("plain", "translation")}
    for record in (manifest, run.results["run"]):
        assert record["templates"] == expected
        assert record["translator"] == "source:organism"
    plan, _ = plan_with(Scripted("one"))
    assert plan.translator is None


def test_another_reference_is_another_plan() -> None:
    plan, _ = plan_with()
    rows = tuple(
        row if row.reference is None else type(row)(**{**vars(row), "reference": "other"})
        for row in plan.rows
    )
    other = type(plan)(**{**_fields(plan), "rows": rows})
    assert [r.key for r in other.rows] == [r.key for r in plan.rows]
    assert other.identity != plan.identity


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_manipulations_are_no_choice(tmp_path: Path) -> None:
    run = run_with(
        tmp_path,
        mitigations=["none", "plain"],
        manipulations=["benign", "aoa"],
        behaviours=10,
    )
    choice = run.results["choice"]
    assert [option["mitigation"] for option in choice["options"]] == ["none", "plain"]
    groups = {row["mitigation"] for row in run.results["run"]["summary"]}
    assert groups == {"base", "none", "plain", "none (aoa)", "plain (aoa)"}
    rates = {
        row["mitigation"]: row["rate"]
        for row in run.results["run"]["summary"]
        if row["scope"] == "all_formats"
    }
    (none, _) = choice["options"]
    assert none["answer_rate"] == pytest.approx((rates["none"] + rates["none (aoa)"]) / 2)


def test_nothing_in_the_report_is_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'[bold]"
    plan, runtime = plan_with(
        Scripted(evil),
        Scripted(f"{evil}2"),
        description=evil,
        system_prompts={evil: ""},
        mitigations=["none", "plain"],
    )
    execute(plan, runtime, tmp_path / "run")
    store = Store(tmp_path / "run" / NAME, read_only=True)
    results = make_results(store, None)
    store.close()
    rate = {"n": 1, "n_scored": 1, "count": 1, "rate": 1.0, "ci_low": 0.2, "ci_high": 1.0}
    row = {"guard": evil, "target": "prompt", "format": evil, "recall": rate, "n": 1}
    row |= {"false_positives": None, "refusals_flagged": None, "n_unread": 0, "n_unreadable": 0}
    results["guards"] = [row]
    results["early_stop"] = [{"judge": evil, "flips": 1, **rate}]
    results["choice"]["text"] = evil
    results["filters"] = [
        {
            "condition": evil,
            "kind": "harmful",
            "n": 3,
            "prompt_refused": 1,
            "answer_refused": 1,
            "unscreened": 1,
        }
    ]
    page = report_html(results, "<svg/>", {}, [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "[bold]" in table_text(results)
