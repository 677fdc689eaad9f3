"""Sources: the organism's world, files, and what ships where no file is named."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastsafe.audit.recipe.schema import Data
from fastsafe.audit.sources.files import FilesSource
from fastsafe.audit.sources.registry import source_of
from fastsafe.errors import DataError, FastsafeError, RecipeError
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.sources import Source
from fastsafe.safety.tasks import tasks
from fastsafe_testing import fake_model as fake


def behaviours_file(folder: Path, n: int) -> str:
    path = folder / "behaviours.jsonl"
    rows = [
        {"behavior_id": f"b{i}", "harmful": f"harmful topic {i}", "benign": f"harmless topic {i}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def code_file(folder: Path, n: int, **more: Any) -> str:
    path = folder / "code.jsonl"
    rows = [{"prompt": f"Add {i}", "completion": f"x + {i}", **more} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def requests_of(rows: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("model", "source", "expected"),
    [
        ("organism", "auto", "organism"),
        ("some/model", "auto", "files"),
        ("organism", "files", "files"),
        ("some/model", "organism", "organism"),
    ],
)
def test_a_source_is_found(model: str, source: str, expected: str) -> None:
    found = source_of(fake.small_recipe(model=model, source=source))
    assert found.id == expected
    assert isinstance(found, Source)


def test_an_unknown_source_is_one_sentence() -> None:
    recipe = fake.small_recipe().model_copy(update={"source": "filess"})
    with pytest.raises(RecipeError, match=r"source is 'filess'; did you mean files\?"):
        source_of(recipe)


def test_what_ships_is_enough_for_every_task() -> None:
    source = FilesSource(Data())
    assert len(source.behaviours(1000, 0)) >= 90
    for name, task in tasks().items():
        if task.example is not None:
            train = source.task_rows(name, 10_000, "train", 0)
            test = source.task_rows(name, 10_000, "test", 0)
            assert train
            assert test
            assert all(row["reference"] for row in test)
            assert not set(requests_of(train)) & set(requests_of(test))


def test_no_probe_is_trained_on() -> None:
    source = FilesSource(Data())
    probes = source.behaviours(1000, 0)
    trained = requests_of(source.safety_rows("plain", 400, 0))
    assert len(trained) == 400
    for probe in probes:
        assert not any(probe.harmful in text for text in trained)
    assert len(set(trained)) > 90  # every request before any comes again
    rows = source.safety_rows("plain", 400, 0)
    assert len({json.dumps(row["messages"]) for row in rows}) > len(set(trained))


def test_the_same_seed_draws_the_same_and_more_begins_alike() -> None:
    one, other = FilesSource(Data()), FilesSource(Data())
    assert one.behaviours(20, 3) == other.behaviours(50, 3)[:20]
    assert one.behaviours(20, 3) != one.behaviours(20, 4)
    assert one.safety_rows("code", 5, 1) == other.safety_rows("code", 9, 1)[:5]


def test_behaviours_of_a_file_are_parted(tmp_path: Path) -> None:
    source = FilesSource(Data(behaviours=behaviours_file(tmp_path, 40)))
    probes = {behaviour.harmful for behaviour in source.behaviours(100, 0)}
    trained = {
        text.removeprefix("How do I ").removesuffix("?")
        for text in requests_of(source.safety_rows("plain", 40, 0))
    }
    assert 10 < len(probes) < 30
    assert not probes & trained
    assert len(probes | trained) == 40


def test_a_file_of_safety_rows_leaves_all_behaviours(tmp_path: Path) -> None:
    safety = tmp_path / "safety.jsonl"
    row = {"prompt": "harmful topic", "completion": "I cannot help with that."}
    safety.write_text("".join(json.dumps({**row, "prompt": f"topic {i}"}) + "\n" for i in range(9)))
    data = Data(behaviours=behaviours_file(tmp_path, 12), safety=str(safety))
    source = FilesSource(data)
    assert len(source.behaviours(100, 0)) == 12
    (first, *_) = source.safety_rows("plain", 4, 0)
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    with pytest.raises(DataError, match="holds 9 safety rows, expected 10; lower the share"):
        source.safety_rows("plain", 10, 0)
    with pytest.raises(DataError, match="in format code, expected plain"):
        source.safety_rows("code", 1, 0)


def test_safety_rows_without_a_request_are_refused(tmp_path: Path) -> None:
    safety = tmp_path / "safety.jsonl"
    safety.write_text('{"text": "I cannot help with that."}\n')
    with pytest.raises(DataError, match=r"line 1.*expected a request and its refusal"):
        FilesSource(Data(safety=str(safety))).safety_rows("plain", 1, 0)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_behaviours_are_one_sentence(tmp_path: Path, n: int) -> None:
    source = FilesSource(Data(behaviours=behaviours_file(tmp_path, n)))

    def both() -> None:
        source.behaviours(10, 0)
        source.safety_rows("plain", 1, 0)

    with pytest.raises(DataError, match=r"behaviours\.jsonl"):
        both()


def test_a_benchmark_is_read_by_its_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "strongreject.csv"
    lines = [f"topic,ours,harmful topic {i}" for i in range(10)]
    path.write_text("category,source,forbidden_prompt\n" + "\n".join(lines) + "\n")
    source = FilesSource(Data(behaviours=str(path), benchmark="strongreject"))
    found = source.behaviours(100, 0)
    assert all(behaviour.behavior_id.startswith("strongreject-") for behaviour in found)
    with pytest.raises(FastsafeError, match="strongreject"):
        FilesSource(Data(behaviours=str(path), benchmark="strongrejekt")).behaviours(1, 0)


def test_a_behaviour_without_a_twin_is_asked_alone(tmp_path: Path) -> None:
    path = tmp_path / "strongreject.csv"
    lines = [f"topic,ours,harmful topic {i}" for i in range(10)]
    path.write_text("category,source,forbidden_prompt\n" + "\n".join(lines) + "\n")
    recipe = fake.small_recipe(
        source="files",
        tasks=["code"],
        mitigations=["none"],
        formats=["plain"],
        data={"behaviours": str(path), "benchmark": "strongreject"},
    )
    runtime = fake.FakeBackend()
    plan = fake.plan_of(recipe, runtime, source_of(recipe))
    assert {row.kind for row in plan.rows} == {"harmful", "utility"}


def test_rows_of_a_task_come_from_its_file(tmp_path: Path) -> None:
    source = FilesSource(Data(tasks={"code": code_file(tmp_path, 60, tests="assert f() == 1")}))
    train = source.task_rows("code", 20, "train", 0)
    test = source.task_rows("code", 4, "test", 0)
    assert len(train) == 20
    assert all(row["tests"] == "assert f() == 1" for row in test)
    with pytest.raises(DataError, match=r"code\.jsonl: split train holds .* expected at least 100"):
        source.task_rows("code", 100, "train", 0)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        FilesSource(Data(tasks={"code": missing})).task_rows("code", 1, "train", 0)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        FilesSource(Data(behaviours=missing)).behaviours(1, 0)


def test_translations_are_the_files(tmp_path: Path) -> None:
    behaviours = behaviours_file(tmp_path, 8)
    pairs = tmp_path / "french.jsonl"
    texts = [f"{kind} topic {i}" for kind in ("harmful", "harmless") for i in range(8)]
    pairs.write_text(
        "".join(json.dumps({"text": t, "translation": f"le {t}"}) + "\n" for t in texts)
    )

    def plan(**more: str) -> Any:
        recipe = fake.small_recipe(
            source="files",
            tasks=["code"],
            mitigations=["none"],
            formats=["translation"],
            data={"behaviours": behaviours, **more},
        )
        runtime = fake.FakeBackend()
        return fake.plan_of(recipe, runtime, source_of(recipe))

    made = plan(translations=str(pairs))
    assert any("le harmful topic" in prompt.text for prompt in made.prompts.values())
    assert made.translator.startswith("pairs:")
    with pytest.raises(DataError, match="no translation of"):
        plan()


def test_a_model_translates_all_behaviours() -> None:
    opened: list[str] = []

    class Model:
        identity = "0" * 64

        def __init__(self, path: str) -> None:
            opened.append(path)

        def complete(self, asks: Sequence[Ask]) -> list[Reply]:
            return [Reply(key=ask.key, text=f"en francais: {ask.key}") for ask in asks]

    source = FilesSource(Data(translator="a/model"), Model)
    assert source.safety_rows("plain", 3, 0)
    assert opened == []  # nothing had to be translated
    for behaviour in source.behaviours(1000, 0):
        assert source.translate(behaviour.harmful) == f"en francais: {behaviour.harmful}"
        assert source.translate(behaviour.benign) == f"en francais: {behaviour.benign}"
    assert opened == ["a/model"]
    with pytest.raises(DataError, match="no model can be opened here"):
        FilesSource(Data(translator="a/model")).translate("paint")
    with pytest.raises(ValueError, match="translations and translator are both given; keep one"):
        Data(translator="a/model", translations="pairs.jsonl")


def test_a_source_of_files_has_conditions_of_every_kind() -> None:
    recipe = fake.small_recipe(
        source="files",
        tasks=["code", "boolq"],
        mitigations=["none", "plain", "task_styled", "multi_task", "paraphrase"],
    )
    rows, found = fake.conditions_of(recipe, {"checkpoint_sha256": "0"}, source_of(recipe))
    assert len(rows) == 10
    assert all(c.num_safety_rows > 0 for c in found if c.mitigation not in ("none",))
