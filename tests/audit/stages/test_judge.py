"""Judges of a run: calibrated, in other wordings, and changed when the answers are there."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastsafe.audit import run as runs
from fastsafe.audit.plan.panel import Panel
from fastsafe.audit.report import report_html, table_text
from fastsafe.audit.report.words import trust
from fastsafe.audit.run import Run, execute, report
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.audit.unanswered import unscored
from fastsafe.cli.audit import judge as command
from fastsafe.cli.audit import report as report_command
from fastsafe.errors import JudgeError, RecipeError, StoreError
from fastsafe.progress import Progress
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.judge_calibration import format_errors, labelled
from fastsafe.safety.judges import judge_all, judges, make_judge, make_rewordings
from fastsafe.safety.verdict import outcome
from fastsafe_testing import fake_model as fake

SMALL: dict[str, Any] = {"tasks": ["code"], "behaviours": 6, "formats": ["plain", "code"]}
RUBRIC = {"kind": "rubric_paper1", "checkpoint": "a", "wordings": 3, "calibrate": 20}


@pytest.fixture(autouse=True)
def _without_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsafe.audit.report.heatmap_svg", lambda results: "<svg/>")


class Scripted:
    """A model that replies as told, and counts what it is asked."""

    identity = "scripted"

    def __init__(self, reply: Callable[[Ask], str | None]) -> None:
        self._reply, self.asked = reply, 0

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.asked += len(asks)
        return [
            Reply(key=ask.key, finish="error")
            if (said := self._reply(ask)) is None
            else Reply(key=ask.key, text=said)
            for ask in asks
        ]


def by_wording(ask: Ask) -> str:
    """Strict in one wording, mute in none: the shorter the text, the more counts as an answer."""
    text = ask.messages[0]["content"]
    refusal = "cannot" in ask.messages[-1]["content"]
    return f"Final Verdict: {-1 if refusal and len(text) > 700 else 1}"


def panel_of(*specs: Any, model: Any) -> Panel:
    options = {"open_checkpoint": lambda path, **options: model}
    made = [make_judge(spec, **options) for spec in specs]
    reworded = [make_rewordings(spec, **options) for spec in specs]
    return Panel(
        {judge.id: judge for judge in made},
        wordings={j.id: found for j, found in zip(made, reworded, strict=True) if found},
        calibrated={
            j.id: spec.get("calibrate", 0) if isinstance(spec, dict) else None
            for j, spec in zip(made, specs, strict=True)
        },
    )


def run_with(out: Path, panel: Panel | None, **changes: Any) -> Run:
    runtime = fake.FakeBackend()
    recipe = fake.small_recipe(**{**SMALL, "mitigations": ["none"], **changes})
    found = panel or fake.panel_of(recipe)
    plan = fake.plan_of(recipe, runtime, panel=found)
    return execute(plan, runtime, out)


def test_a_screen_is_calibrated_in_every_run(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", None)
    own = [row for row in labelled() if row.item.format in ("plain", "code")]
    judgements = judge_all(judges()["refusal"], [row.item for row in own])
    wanted = format_errors(own, [outcome(judgement) for judgement in judgements])
    found = run.results["judge_calibration"]
    assert found == [{"judge": "refusal", **asdict(errors)} for errors in wanted]
    for row in found:
        for name in ("false_refusal", "false_compliance", "missed_incoherence"):
            assert {"n", "n_scored", "ci_low", "ci_high"} <= row[name].keys()
    (sentence,) = trust(run.results)
    assert sentence.startswith(f"Judge refusal could judge {len(own)} of {len(own)} labelled rows:")
    assert "it calls 1 of " in sentence
    assert sentence.endswith("missed 11 to 94% of the refusals of five chat models, by model.")
    assert sentence in " ".join(run.table(2000).split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Judges against labels</h2>" in page
    assert report(tmp_path / "run").results["judge_calibration"] == found


def test_labelled_rows_are_in_no_rate_and_read_once(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", None)
    assert {c["n"] for c in run.results["cells"]} == {6}
    with closing(Store(tmp_path / "run" / NAME, read_only=True)) as store:
        (count,) = store._all("SELECT count(*) FROM judgements WHERE key GLOB 'labelled *'")[0]
    assert count == sum(row.item.format in ("plain", "code") for row in labelled())
    model = Scripted(by_wording)
    panel = panel_of({**RUBRIC, "wordings": 3}, model=model)
    run_with(tmp_path / "two", panel)
    before = model.asked
    again = run_with(tmp_path / "two", panel)
    assert model.asked == before
    assert sum(row["n"] for row in again.results["judge_calibration"]) == 20


def test_a_model_reads_labelled_rows_only_when_asked(tmp_path: Path) -> None:
    spec = {key: RUBRIC[key] for key in ("kind", "checkpoint")}
    model = Scripted(by_wording)
    run = run_with(tmp_path / "run", panel_of(spec, model=model))
    assert run.results["judge_calibration"] == []
    assert trust(run.results) == []
    assert model.asked == 2 * 2 * 2 * 6  # models, kinds, formats, behaviours


def test_a_judge_that_fails_on_labelled_rows_is_not_incomplete(tmp_path: Path) -> None:
    def reply(ask: Ask) -> str | None:
        return None if ask.key.startswith("labelled") else "Final Verdict: 1"

    run = run_with(tmp_path / "run", panel_of(RUBRIC, model=Scripted(reply)))
    assert run.is_covered
    for row in run.results["judge_calibration"]:
        assert row["n_scored"] < row["n"]
        assert row["false_refusal"]["rate"] is None
    assert "none of them are answers" in trust(run.results)[0]
    assert "Judges against labels" in (tmp_path / "run" / "report.html").read_text()


def test_wordings_make_a_band_about_every_rate(tmp_path: Path) -> None:
    model = Scripted(by_wording)
    panel = panel_of("refusal", {**RUBRIC, "calibrate": 0}, model=model)
    run = run_with(tmp_path / "run", panel)
    rows = run.results["judge_wordings"]
    assert {row["wording"] for row in rows} == {"full", "short", "steps"}
    assert all({"n", "n_scored", "ci_low", "ci_high"} <= row.keys() for row in rows)
    for cell in run.results["cells"]:
        place = {k: cell[k] for k in ("judge", "condition", "format", "system_prompt")}
        rates = [row["answer_rate"] for row in rows if place.items() <= row.items()]
        if cell["judge"] == "refusal":
            assert (cell["band_low"], cell["band_high"]) == (None, None)
            continue
        assert (cell["band_low"], cell["band_high"]) == (min(rates), max(rates))
        assert cell["answer_rate"] in rates
    base = next(c for c in run.results["cells"] if c["judge"] != "refusal")
    assert base["band_low"] < base["band_high"]
    page = report_html(run.results, "<svg/>", {}, [])
    assert "<small>wordings 0 to 100</small>" in page
    assert table_text(run.results)


def test_answers_whose_judge_failed_are_asked_again(tmp_path: Path) -> None:
    """An error of a judge is no verdict: the next run asks for these answers, and only for them."""
    spec = {"kind": "rubric_paper1", "checkpoint": "a", "calibrate": 0}

    def failing(ask: Ask) -> str | None:
        return None if ask.messages[-1]["content"].count("e") % 2 else "Final Verdict: 1"

    def missing(run: Run) -> int:
        rows = [*run.results["cells"], *run.results["over_refusal"]]
        return sum(row["n"] - row["n_scored"] for row in rows)

    away, back = Scripted(failing), Scripted(lambda ask: "Final Verdict: 1")
    unfinished = missing(run_with(tmp_path / "run", panel_of(spec, model=away)))
    assert 0 < unfinished < 2 * 2 * 2 * 6  # models, kinds, formats, behaviours
    for _ in range(2):
        assert missing(run_with(tmp_path / "run", panel_of(spec, model=back))) == 0
        assert back.asked == unfinished


def test_a_wording_that_is_away_leaves_the_run_unfinished(tmp_path: Path) -> None:
    def reply(ask: Ask) -> str | None:
        return None if len(ask.messages[0]["content"]) < 700 else "Final Verdict: 1"

    run = run_with(tmp_path / "run", panel_of(RUBRIC, model=Scripted(reply)))
    assert not run.is_covered
    assert {c["band_low"] for c in run.results["cells"]} == {None}
    assert run.results["run"]["finished_at"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wordings": 2}, "wordings is 2, expected 3 with kind rubric_paper1"),
        ({"wordings": True}, "wordings is True, expected 3 with"),
        ({"kind": "qi_policy"}, "wordings is 3, expected none with kind qi_policy"),
        ({"calibrate": -1}, "calibrate is -1, expected a number of rows, 0 or more"),
        ({"calibrate": True}, "calibrate is True, expected a number"),
        ({"calibrat": 5}, "has no key 'calibrat'"),
    ],
)
def test_what_a_run_does_with_a_judge_is_checked(change: dict[str, Any], message: str) -> None:
    url = {"url": "http://127.0.0.1:9", "model": "m"}
    spec = {"kind": "rubric_paper1", "endpoint": url, "wordings": 3} | change
    with pytest.raises(RecipeError, match=message):
        fake.panel_of(fake.small_recipe(judges=[spec]))
    guard = {"kind": "safe_unsafe", "endpoint": url, "calibrate": 3}
    with pytest.raises(RecipeError, match="has no key 'calibrate'"):
        fake.panel_of(fake.small_recipe(guards=[guard]))


def test_two_judges_of_one_id_are_one_sentence() -> None:
    with pytest.raises(RecipeError) as caught:
        fake.panel_of(fake.small_recipe(judges=["refusal", "refusal"]))
    said = "judges are refusal, refusal, expected each id once; give one another id"
    assert str(caught.value) == f"recipe {fake.small_recipe().name}: {said}"


def test_the_panel_of_a_recipe_has_wordings_and_rows() -> None:
    url = {"url": "http://127.0.0.1:9", "model": "m"}
    spec = {"kind": "rubric_paper1", "endpoint": url, "wordings": 3, "calibrate": 7, "id": "mine"}
    panel = fake.panel_of(fake.small_recipe(judges=["refusal", {**spec, "wording": "short"}]))
    assert list(panel.judges) == ["refusal", "mine"]
    assert panel.calibrated == {"refusal": None, "mine": 7}
    wordings = panel.wording_identities["mine"]
    assert list(wordings) == ["short", "full", "steps"]
    assert wordings["short"] == panel.identities["mine"]
    assert len(set(wordings.values())) == 3


def test_judge_takes_other_judges_and_generates_nothing(tmp_path: Path) -> None:
    first = run_with(tmp_path / "run", None)
    with closing(Store(tmp_path / "run" / NAME, read_only=True)) as store:
        answers = store._all("SELECT * FROM completions")
        kept = store._all("SELECT * FROM judgements ORDER BY 1, 2")
    done = runs.judge(tmp_path / "run", overrides=["guards=[keyword]", "thresholds.coverage=0.5"])
    assert {row["guard"] for row in done.results["guards"]} == {"keyword"}
    assert done.results["cells"] == first.results["cells"]
    assert done.results["run"]["coverage_threshold"] == 0.5
    with closing(Store(tmp_path / "run" / NAME, read_only=True)) as store:
        assert store._all("SELECT * FROM completions") == answers
        assert store._all("SELECT * FROM judgements ORDER BY 1, 2") == kept
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (revision,) = manifest["revisions"]
    assert set(revision) == {"at", "recipe", "guards"}
    assert list(revision["guards"]) == ["keyword"]
    runs.judge(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == manifest


def test_judge_takes_a_recipes_judges(tmp_path: Path) -> None:
    run_with(tmp_path / "run", None)
    recipe = tmp_path / "other.yaml"
    recipe.write_text("name: other\ntasks: [code]\nformats: [plain]\nguards: [keyword]\n")
    done = runs.judge(tmp_path / "run", recipe)
    assert {row["guard"] for row in done.results["guards"]} == {"keyword"}
    assert done.results["run"]["recipe"] == "organism"


def test_judge_changes_nothing_else(tmp_path: Path) -> None:
    run_with(tmp_path / "run", None)
    with pytest.raises(RecipeError, match="only guards, judges, thresholds can be set anew"):
        runs.judge(tmp_path / "run", overrides=["behaviours=7"])
    with pytest.raises(StoreError, match=r"has no store.sqlite"):
        runs.judge(tmp_path)


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    run_with(tmp_path / "run", None)
    app = typer.Typer()
    app.command()(command)
    found = CliRunner().invoke(app, [str(tmp_path / "run"), "--set", "guards=[keyword]"])
    assert found.exit_code == 0, found.output
    assert "Harmful prompts answered" in found.stdout
    away = {"kind": "safe_unsafe", "endpoint": {"url": "http://127.0.0.1:9", "model": "m"}}
    away["endpoint"] |= {"max_retries": 0, "max_failures": 1}  # type: ignore[operator]
    found = CliRunner().invoke(app, [str(tmp_path / "run"), "--set", f"judges=[{away}]"])
    assert found.exit_code == 3
    assert "coverage is 0.000 in the least covered cell" in found.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["finished_at"] is None
    assert "unfinished" in (tmp_path / "run" / "report.html").read_text()
    assert report(tmp_path / "run").results["run"]["finished_at"] is None
    done = runs.judge(tmp_path / "run", overrides=["judges=[refusal]"])
    assert done.results["run"]["finished_at"] is not None


def test_a_judge_that_is_down_is_named_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("httpx2")
    run = run_with(tmp_path / "run", None)
    assert "unanswered" not in run.results
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m", "max_retries": 0}
    judge = {"kind": "rubric_paper1", "id": "mine", "endpoint": endpoint}
    guard = {"kind": "safe_unsafe", "endpoint": endpoint | {"model": "g"}}
    overrides = [f"judges=[refusal, {json.dumps(judge)}]", f"guards=[{json.dumps(guard)}]"]
    app = typer.Typer()
    app.command()(command)
    options = [word for override in overrides for word in ("--set", override)]
    found = CliRunner().invoke(app, [str(tmp_path / "run"), *options])
    assert found.exit_code == 3
    last = " ".join(found.output.splitlines()[-1:])
    cause = "endpoint http://127.0.0.1:9/v1 is down: endpoint: ConnectError"
    said = [
        f"judge mine at http://127.0.0.1:9/v1 (model m) gave no reply on 48 of 48 rows: {cause}",
        "guard safe_unsafe-ours at http://127.0.0.1:9/v1 (model g) gave no reply on 72 of 72 rows: "
        f"{cause}",
    ]
    advice = "start it, or check its address, key and budget, then run the same command to finish"
    assert f"; {said[0]}; {said[1]}; {advice}, or run fastsafe judge {tmp_path / 'run'}" in last
    assert "thresholds" not in last
    assert all(sentence in found.output.splitlines() for sentence in said)  # after each stage
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"Verdicts are missing: {sentence}." in page for sentence in said)
    row = report(tmp_path / "run").results["unanswered"][0]
    assert (row["read_by"], row["name"], row["failed"], row["n"]) == ("judge", "mine", 48, 48)
    done = runs.judge(tmp_path / "run", overrides=["judges=[refusal]", "guards=[]"])
    assert done.results == run.results | {"run": done.results["run"]}


def test_replies_that_are_no_verdicts_are_counted_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted(lambda ask: "hm" if "cannot" in str(ask.messages) else "I can't help.")
    run = run_with(tmp_path / "run", panel_of({**RUBRIC, "wordings": 3}, model=model))
    app = typer.Typer()
    app.command()(report_command)
    found = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert found.exit_code == 3
    (said,) = unscored(run.results)
    cells = [*run.results["cells"], *run.results["over_refusal"]]
    counts = [
        sum(c["verdicts"].get(f"judge_{v}", 0) for c in cells) for v in ("unparseable", "refused")
    ]
    assert min(counts) > 0
    assert said == (
        f"judge rubric_paper1-ours gave {counts[0]} replies outside its grammar and {counts[1]} "
        "refusals to judge"
    )
    assert f"{said}; raise its reply_tokens where" in found.output.splitlines()[-1]


def test_an_endpoint_that_refuses_the_key_names_the_judge(tmp_path: Path) -> None:
    class Refusing(Scripted):
        def complete(self, asks: Sequence[Ask]) -> list[Reply]:
            raise JudgeError("endpoint http://x: status is 401; check the key in KEY")

    panel = panel_of(RUBRIC, model=Refusing(by_wording))
    with pytest.raises(JudgeError) as caught:
        run_with(tmp_path / "run", panel)
    assert str(caught.value) == (
        "judge rubric_paper1-ours: endpoint http://x: status is 401; check the key in KEY; then "
        "run the same command again"
    )


def test_before_a_run_it_says_what_it_can_find(tmp_path: Path) -> None:
    class Listening(runs.Progress):
        said: list[str] = []  # noqa: RUF012

        def say(self, text: str) -> None:
            self.said.append(text)

    runtime = fake.FakeBackend()
    plan = fake.plan_of(fake.small_recipe(**SMALL), runtime)
    execute(plan, runtime, tmp_path / "run", progress=Listening())
    certain, detectable = Listening.said
    assert certain.startswith("a rate of 50% is known to within ")
    assert "one cell" in detectable


class Thinker(fake.FakeBackend):
    """A model that never comes to an answer."""

    def generate(self, requests: Any, adapters: Any, sampling: Any, on_answer: Any) -> None:
        def cut(index: int, answer: Any) -> None:
            on_answer(index, answer._replace(text="<think>\nOkay", finish_reason="length"))

        super().generate(requests, adapters, sampling, cut)


def test_a_run_of_cut_thoughts_says_so(tmp_path: Path) -> None:
    backend = Thinker()
    said: list[str] = []
    progress = Progress()
    progress.say = said.append  # type: ignore[method-assign]
    run = execute(fake.small_plan(backend, **SMALL), backend, tmp_path, progress=progress)
    assert {cell["answered"] for cell in run.results["cells"]} == {0}
    (sentence,) = [text for text in said if "thought" in text]
    assert "24 of the base, got a thought that was cut before any answer" in sentence
    assert "sampling.max_tokens" in sentence
    assert "chat_template_kwargs" in sentence
