"""The tables of the terminal: every label and number at any width."""

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.report import sentences, table_text
from fastsafe.audit.report.matrix import percent
from fastsafe_testing import fake_model as fake


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("report") / "run"
    fake.small_run(path, behaviours=30)
    return path


@pytest.fixture(scope="module")
def results(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_a_table_of_any_width_holds_every_label_and_rate(
    results: dict[str, Any], width: int
) -> None:
    text = table_text(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert not set(text) & {"\u2026"}
    # the same numbers as on the widest terminal, and every row has its names
    wide = table_text(results, 200)
    assert Counter(re.findall(r"\d+", text)) == Counter(re.findall(r"\d+", wide))
    names = Counter(re.findall(r"untouched|code|plain|none", wide))
    assert not names - Counter(re.findall(r"untouched|code|plain|none", text))


def test_rows_of_one_task_stay_apart_on_a_narrow_terminal(tmp_path: Path) -> None:
    run = fake.small_run(tmp_path / "run", tasks=["code"], styles=["native", "alpaca"])
    for width in (80, 120):
        lines = [line.split() for line in table_text(run.results, width).splitlines()]
        assert ["code,", "alpaca", "none"] in [line[:3] for line in lines]
        assert ["code", "none"] in [line[:2] for line in lines]


def test_the_terminal_shows_guards(results: dict[str, Any]) -> None:
    rate = {"n": 9, "n_scored": 9, "count": 3, "rate": 1 / 3, "ci_low": 0.1, "ci_high": 0.6}
    row = {"guard": "keyword", "target": "answer", "format": "plain", "recall": rate}
    row |= {"false_positives": None, "refusals_flagged": None}
    row |= {"n": 9, "n_unread": 0, "n_unreadable": 2}
    assert "keyword" not in table_text(results)
    text = table_text(results | {"guards": [row]})
    assert re.search(r"keyword +answer +plain +33 \(10\.0\S60\.0\) +- +- +2 of 9", text)
    assert "keyword" not in table_text(results | {"guards": [row | {"n_unread": 9}]})


def test_many_mitigations_have_a_table_instead_of_paragraphs(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    few = len(sentences(changed))
    plain = [row for row in changed["run"]["summary"] if row["mitigation"] == "plain"]
    conditions = [c for c in changed["conditions"] if c["mitigation"] == "plain"]
    for number in range(5):
        name = f"mix{number}"
        changed["run"]["summary"] += [row | {"mitigation": name} for row in plain]
        changed["conditions"] += [c | {"mitigation": name, "id": name} for c in conditions]
    assert len(sentences(changed)) == few - 1  # the paragraph of the one mitigation
    assert "Mitigations compared" not in table_text(results)
    text = table_text(changed).partition("Mitigations compared")[2]
    rate = next(row["rate"] for row in plain if row["scope"] == "all_formats")
    line = next(line for line in text.splitlines() if line.startswith("Mix3"))
    assert f" {percent(rate)} (" in line


def test_the_table_holds_the_rates(results: dict[str, Any]) -> None:
    line = next(
        line for line in table_text(results).splitlines() if re.match(r" *code +none", line)
    )
    rates = [c["answer_rate"] for c in results["cells"] if c["condition"] == "code+none"]
    assert re.findall(r"\d+(?= [▲ ])", line)[: len(rates)] == [percent(rate) for rate in rates]


def test_seeds_have_tables_of_their_own(tmp_path: Path) -> None:
    run = fake.small_run(tmp_path / "run", tasks=["code"], seeds=[0, 3], utility_rows=0)
    rows = run.results["over_seeds"]
    assert {row["kind"] for row in rows} == {"harmful", "benign"}
    assert all(set(row["rates"]) == {"0", "3"} for row in rows)
    per_seed = {(c["condition"], c["format"]): c["answer_rate"] for c in run.results["cells"]}
    for row in rows:
        if row["kind"] == "harmful":
            both = [per_seed[f"{row['condition']}+seed{n}", row["format"]] for n in (0, 3)]
            assert row["rate"] == pytest.approx(sum(both) / 2)
            assert [row["rates"][n] for n in ("0", "3")] == both
            assert row["ci_low"] <= row["rate"] <= row["ci_high"]
    text = table_text(run.results)
    assert "Harmful prompts answered, %, mean over training seeds, judge refusal" in text
    assert "code #3" in text
    narrow = table_text(run.results, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert all(name in narrow for name in ("code +none", "code #3"))
    assert "(2 training seeds)" in " ".join(text.split()) or run.results["choice"]
    page = (run.path / "report.html").read_text()
    assert "Benign twins refused, over training seeds, judge refusal" in page
    assert "<span>seed 0, 3</span>" in page
    assert fake.small_run(tmp_path / "one", utility_rows=0).results["over_seeds"] == []
