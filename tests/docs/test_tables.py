"""The tables of docs/ say what the code says: every key, default, name and formula."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import fastsafe
from fastsafe.audit.plan.mitigation_variants import mitigation_stages
from fastsafe.audit.recipe.load import load, names
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.data.shapes import SHAPES
from fastsafe.engine import LLM, SamplingParams
from fastsafe.safety.behaviours import seed_behaviours
from fastsafe.safety.benchmarks import Benchmark, benchmarks
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.defences import Defence
from fastsafe.safety.formats import Format
from fastsafe.safety.judge_calibration import labelled
from fastsafe.safety.judges import Judge, families
from fastsafe.safety.lint import Rule
from fastsafe.safety.mixing import Mitigation
from fastsafe.safety.mixing.manipulations import manipulations
from fastsafe.safety.sources import Source
from fastsafe.safety.tasks import Task, load_rows, tasks
from fastsafe.safety.verdict import COUNTS
from fastsafe.train.objectives import objectives

DOCS = Path(__file__).parents[2] / "docs"
REQUIRED = "required"
RUBRIC = "the rubric says"


def table(page: str, head: str) -> list[list[str]]:
    """Cells of the rows of the only table of a page whose first column is called so."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    (body,) = re.findall(
        rf"^\| {re.escape(head)} \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text, re.MULTILINE
    )
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def value(cell: str) -> Any:
    """Default that a cell of one quoted YAML value names."""
    return REQUIRED if cell.startswith(REQUIRED) else yaml.safe_load(quoted(cell)[0])


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and defaults of a section and of those in it, as a recipe writes them."""
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else ()
        inner = [k for k in (field.annotation, *kinds) if isinstance(k, type)]
        parts = [k for k in inner if issubclass(k, BaseModel)]
        if parts:
            yield from keys(parts[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", REQUIRED if field.is_required() else plain(field.default)


def plain(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given


def fields(part: type, *left_out: str) -> dict[str, Any]:
    return {
        field.name: REQUIRED if field.default is dataclasses.MISSING else plain(field.default)
        for field in dataclasses.fields(part)
        if field.name not in left_out
    }


def test_keys_of_a_recipe() -> None:
    rows = table("recipes", "key")
    assert [(quoted(key)[0], value(default)) for key, default, _ in rows] == list(keys(Recipe))


def test_stages_of_mitigations() -> None:
    stages: dict[str, list[str]] = {}
    for name, (stage, _) in mitigation_stages().items():
        stages.setdefault(stage, []).append(name)
    for cell, *_ in table("recipes", "stage"):
        stage, _, listed = cell.partition(": ")
        expected = sorted(stages.pop(stage))
        # objectives have a table of their own
        assert stage == "train" or sorted(quoted(listed)[0].split()) == expected
    assert not stages


def test_shipped_recipes_and_manipulations() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert sorted(quoted(name)[0] for name, _ in table("recipes", "recipe")) == sorted(names())
    assert set(manipulations()) <= set(quoted(page))
    sweep = load("do-as-i-do")
    assert (len(sweep.tasks), len(sweep.manipulations), len(sweep.mitigations)) == (2, 4, 5)


def test_verdicts_count_as_the_table_says() -> None:
    said = {True: "yes", False: "no", None: RUBRIC}
    found = {}
    for names_, _, scored, answered, harmful in table("judges", "verdict"):
        found |= dict.fromkeys(quoted(names_), (scored, answered, harmful))
    for verdict, counts in COUNTS.items():
        expected = (said[counts.in_denominator], said[counts.answered], said[counts.harmful])
        assert found.pop(verdict.value) == (expected if counts.in_denominator else ("no", "", ""))
    assert not found


def test_families_of_judges() -> None:
    rows = {quoted(row[0])[0]: row[1:] for row in table("judges", "kind")}
    for kind, family in families().items():
        if family.classifier is None:
            continue
        classifier = family.classifier(family.options)
        id_, established, prompts, twins, options = rows.pop(kind)
        assert quoted(id_) == [classifier.id]
        assert (prompts == "yes", twins == "yes") == (
            classifier.reads_prompts,
            not classifier.harmful_only,
        )
        assert yaml.safe_load(f"{{{quoted(options)[0]}}}") == dict(family.options)
        about = family.classifier.__globals__["__doc__"]
        for word in re.findall(r"\b(?:verified|secondary|unverified)\b", established):
            assert re.search(rf"\b{word}\b", about), f"{kind}: {word}"
    assert not rows


def test_endpoints_and_labelled_rows() -> None:
    rows = table("judges", "key")
    assert {quoted(key)[0]: value(default) for key, default, _ in rows} == fields(Endpoint)
    assert f"{len(labelled())} labelled rows" in (DOCS / "judges.md").read_text(encoding="utf-8")


def test_shapes_of_rows() -> None:
    found = [(name, quoted(needs), quoted(may)) for name, needs, may in table("training", "shape")]
    assert found == [(s.name, list(s.needs), list(s.may)) for s in SHAPES]


def test_objectives() -> None:
    rows = {quoted(row[0])[0]: row[1:] for row in table("training", "name")}
    for name, objective in objectives().items():
        formula, settings, source = rows.pop(name)
        about = objective.__doc__ or ""
        assert formula == about.partition("\n")[0].partition(" (unverified)")[0]
        given = yaml.safe_load(f"{{{quoted(settings)[0]}}}") if settings else {}
        assert given == fields(objective)
        numbers = re.findall(r"\d{4}\.\d{5}", source)
        assert numbers == re.findall(r"arXiv:(\d{4}\.\d{5})", about)
        evidence = re.findall(r"\(((?:method )?(?:inferred|verified|unverified)[^)]*)\)", about)
        assert [source.removeprefix("".join(f"{n}, " for n in numbers))] == (evidence or [""])
    assert not rows


def test_rules_of_the_lint() -> None:
    assert [quoted(rule)[0] for rule, *_ in table("data", "rule")] == list(get_args(Rule))


def test_tasks_and_their_miniatures() -> None:
    rows = {quoted(row[0])[0]: row[1:] for row in table("data", "task")}
    for name, task in tasks().items():
        columns, metric, others, sizes = rows.pop(name)
        assert quoted(metric) == [task.metric]
        assert quoted(others) == list(task.metrics)
        counts = [len(load_rows(task, None, split)) for split in ("train", "test")]
        assert sizes == ", ".join(map(str, counts))
        layout = fastsafe.__path__[0] + f"/safety/tasks/{name}.py"
        source = Path(layout).read_text(encoding="utf-8")
        assert all(f"``{column}``" in source for column in quoted(columns))
    assert not rows


def test_behaviours_and_benchmarks() -> None:
    shipped = seed_behaviours()
    by_category = {b.category: 0 for b in shipped}
    for behaviour in shipped:
        by_category[behaviour.category] += 1
    (size,) = set(by_category.values())
    said = f"ships {len(shipped)} of ours, {size} in each of {len(by_category)} categories"
    assert said in (DOCS / "data.md").read_text(encoding="utf-8")
    words = {True: "yes", False: "no", None: "not known"}
    rows = {quoted(row[0])[0]: row[1:] for row in table("data", "benchmark")}
    assert rows == {
        name: [each.licence + ("; access on request" if each.gated else ""), words[each.commercial]]
        for name, each in benchmarks().items()
    }


def test_sampling_and_calls_of_the_engine() -> None:
    rows = table("engine", "`SamplingParams`")
    assert {quoted(key)[0]: value(default) for key, default, _ in rows} == fields(SamplingParams)
    for cell, _ in table("engine", "call"):
        for call in quoted(cell):
            name, _, given = call.removesuffix(")").partition("(")
            code = getattr(LLM, name).__code__
            assert given.split(", ") == list(code.co_varnames[1 : code.co_argcount])


@pytest.mark.parametrize(
    ("group", "part"),
    [
        ("tasks", Task),
        ("formats", Format),
        ("judges", Judge),
        ("mitigations", Mitigation),
        ("defences", Defence),
        ("benchmarks", Benchmark),
        ("sources", Source),
    ],
)
def test_groups_of_plugins(group: str, part: type) -> None:
    rows = {quoted(row[0])[0]: row[1] for row in table("plugins", "group")}
    assert re.search(rf"\.{part.__name__}`", rows[f"fastsafe.{group}"])
    assert len(rows) == 8, "with the functions of checkpoints"
