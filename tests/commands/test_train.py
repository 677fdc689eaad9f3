"""``fastsafe train`` below the command line: settings, plans, runs."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fastsafe.audit.recipe.schema import Training
from fastsafe.commands import train
from fastsafe.commands.train_settings import TYPES, settle, train_config
from fastsafe.data.packing import TrainExample
from fastsafe.errors import DataError, RecipeError, StoreError, UsageError
from fastsafe.io import safetensors
from fastsafe.io.lock import exclusive
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model import nf4
from fastsafe.organism import path as organism
from fastsafe.progress import Progress
from fastsafe.train.config import TrainConfig
from fastsafe.train.loop import LOCK
from fastsafe.train.presets import preset, presets


def value(settings: Any, key: str) -> tuple[Any, str]:
    return settings[key].value, settings[key].origin


def test_every_setting_has_an_origin(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("learning_rate: 1e-3\nalpha: 8\ntarget_modules: [q_proj]\n")
    found = settle(
        {"alpha": 4.0, "rank": None}, config_file=file, preset=preset("paper1"), device="cuda"
    )
    assert value(found, "rank") == (64, "preset paper1 (verified)")
    assert value(found, "learning_rate") == (1e-3, f"{file}; preset paper1 (verified) has 0.0002")
    assert value(found, "alpha")[0] == 4.0
    assert value(found, "alpha")[1].startswith(f"given; {file}; preset paper1")
    assert value(found, "target_modules")[0] == ("q_proj",)
    assert value(found, "seed") == (0, "default")
    assert value(found, "dtype") == ("float16", "preset paper1 (verified)")
    assert list(found) == list(TYPES)


def test_a_recipe_has_the_settings_of_a_training() -> None:
    """Its defaults may differ, and `rows` and `preset` are its own."""
    keys = Training.model_fields.keys() - {"rows", "preset"}
    hints = get_type_hints(TrainConfig)
    assert hints.keys() - keys == {"epochs", "shuffle"}
    for key in keys - {"seed", "max_steps", "target_modules", "objective"}:
        assert Training.model_fields[key].annotation == hints[key]


def test_a_cpu_computes_in_float32() -> None:
    found = settle({}, preset=preset("paper1"))
    assert value(found, "dtype") == ("float32", "default on cpu")
    assert settle({"dtype": "bfloat16"})["dtype"].value == "bfloat16"


def test_steps_and_epochs_replace_each_other(tmp_path: Path) -> None:
    found = settle({"epochs": 2.0}, preset=preset("paper1"))
    assert value(found, "max_steps") == (None, "default, as epochs is set")
    found = settle({"warmup_steps": 7}, preset=preset("paper1"))
    assert value(found, "warmup_ratio") == (None, "default, as warmup_steps is set")
    assert train_config(found, num_rows=10, seed=0).warmup_steps == 7


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rnak: 4", "'rnak' is not a setting; did you mean rank"),
        ("shuffle: false", "'shuffle' is not a setting"),
        ("drift_every: often", "drift_every is 'often', expected an integer"),
        ("drift_refusal: 3", "drift_refusal is 3, expected a text"),
        ("drift_stop_above: far", "drift_stop_above is 'far', expected a number"),
        ("learning_rate: fast", "learning_rate is 'fast', expected a number"),
        ("alpha: true", "alpha is True, expected a number"),
        ("max_length: 1", "max_length is 1, expected 2 tokens or more"),
        ("warmup_ratio: 1.5", r"warmup_ratio is 1.5, expected a number in \[0, 1\)"),
        ("target_modules: []", "target_modules is empty, expected names"),
        ("target_modules: 3", "target_modules is 3, expected a list of texts or a text"),
        ("quantize: int8", "quantize is 'int8', expected nf4 or null"),
        ("truncate: 2", "truncate is 2, expected true or false"),
        ("method: prompt", "method is 'prompt', expected lora or full"),
        ("dtype: int8", "dtype is 'int8', expected float32 or"),
        ("rank: eight", "rank is 'eight', expected an integer"),
        ("schedule: steps", "schedule is 'steps', expected constant or linear or cosine"),
        ("rank: 4\nrank: 5", "written twice"),
        ("- rank", "holds a list"),
    ],
)
def test_config_files_are_checked(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises((UsageError, RecipeError), match=why):
        settle({}, config_file=file)


def test_a_path_in_a_config_file_is_relative_to_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("drift_every: 1\ndrift_probes: probes.csv\n")
    assert value(settle({}, config_file=path), "drift_probes")[0] == str(tmp_path / "probes.csv")
    given = settle({"drift_probes": "mine.csv"}, config_file=path)
    assert value(given, "drift_probes")[0] == "mine.csv"


def test_values_of_a_job_are_checked_by_its_config() -> None:
    with pytest.raises(UsageError, match=r"^rank is 0"):
        train_config(settle({"rank": 0}), num_rows=1, seed=0)


def test_presets_are_what_the_papers_give() -> None:
    assert list(presets()) == ["paper1", "paper2"]
    config = train_config(settle({}, preset=preset("paper1")), num_rows=10_000, seed=5)
    known = {
        "rank": 64,
        "alpha": 16,
        "dropout": 0.1,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup_steps": 90,
        "max_steps": 3000,
        "batch_size": 4,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "loss_on": "all",
        "seed": 5,
    }
    assert {k: v for k, v in dataclasses.asdict(config).items() if k in known} == known
    assert len(config.target_modules) == 7
    own = settle({}, preset=preset("paper1"))
    kept = [own[key].value for key in ("method", "quantize", "max_length", "truncate")]
    assert kept == ["lora", "nf4", 1024, True]
    second = settle({}, preset=preset("paper2"))
    kept = [second[key].value for key in ("method", "epochs", "learning_rate", "batch_size")]
    assert kept == ["full", 1, 2e-5, 64]


def test_a_preset_says_what_is_known_of_each_value() -> None:
    for name, known in presets().items():
        text = list(known.lines())
        assert text[0].startswith(f"preset {name}: ")
        for item in (*known.items, *known.not_replicated):
            assert any(f"{item.key} = " in line and f"({item.evidence}" in line for line in text)
            assert item.evidence in ("verified", "inferred", "unverified")
    assert {item.evidence for item in preset("paper2").items} == {"unverified"}
    with pytest.raises(UsageError, match="'paper3' does not exist, expected paper1 or paper2"):
        preset("paper3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from fastsafe.organism.source import SOURCE

    folder = tmp_path_factory.mktemp("data")
    rows = {
        "code": SOURCE.task_rows("code", 40, "train", 0),
        "translation": SOURCE.task_rows("translation", 40, "train", 0),
        "safety": SOURCE.safety_rows("code", 12, 0),
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return {name: folder / f"{name}.jsonl" for name in rows}


def make(files: dict[str, Path], *data: str, given: Any = None, **options: Any) -> train.TrainPlan:
    few = {"rank": 2, "max_steps": 2, "batch_size": 4}
    return train.plan("organism", [str(files[d]) for d in data], few | (given or {}), **options)


def test_a_plan_says_what_will_be_done(files: dict[str, Path]) -> None:
    plan = make(files, "code", "translation", seeds=(0, 3), limit=10)
    facts = json.loads(json.dumps(plan.describe()))
    assert [job["name"] for job in facts["jobs"]] == [
        *("code-seed0", "code-seed3", "translation-seed0", "translation-seed3")
    ]
    assert {job["rows"] for job in facts["jobs"]} == {10}
    assert facts["settings"]["rank"] == {"value": 2, "origin": "given"}
    assert facts["data"][0]["mapping"].startswith("messages (messages), 10 rows; left out: ")
    assert facts["data"][0]["trained_tokens"] < facts["data"][0]["tokens"]
    assert facts["data"][0]["longest"] > 10


def test_the_state_of_a_job_is_told_before(files: dict[str, Path], tmp_path: Path) -> None:
    plan = make(files, "code")
    (result,) = train.execute(plan, tmp_path, Progress())
    held = safetensors.read(result.adapter_dir / "adapter_model.safetensors")
    size = sum(t.numel() for t in held.values())
    assert train.memory(plan) == {"parameters_per_job": size, "bytes_per_job": 16 * size}
    whole = train.memory(make(files, "code", given={"method": "full"}))
    tensors = safetensors.read(organism() / "model.safetensors")
    assert whole["parameters_per_job"] == sum(t.numel() for t in tensors.values())


def test_names(files: dict[str, Path], tmp_path: Path) -> None:
    assert [job.name for job in make(files, "code", name="a").jobs] == ["a"]
    both = make(files, "code", "translation", name="a")
    assert [job.name for job in both.jobs] == ["a-code", "a-translation"]
    with pytest.raises(UsageError, match="two data sets are called 'code'"):
        make(files, "code", "code")
    odd = tmp_path / ". my file!.jsonl"
    odd.write_bytes(files["code"].read_bytes())
    assert make({"odd": odd}, "odd").jobs[0].name == "-my-file-"


def test_safety_rows_are_mixed_in(files: dict[str, Path]) -> None:
    plan = make(files, "code", safety_data=str(files["safety"]), given={"share": 0.2})
    (job,) = plan.jobs
    assert len(job.examples) == 50
    assert sum(row["source"] == "safety" for row in job.examples) == 10
    assert plan.describe()["data"][1]["source"] == str(files["safety"])


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ({"share": 0.2}, {}, "--share: expected --safety-data with it"),
        ({"drift_stop_above": 1.0}, {}, "--drift-stop-above: expected --drift-every with it"),
        ({"seed": 3}, {"seeds": (0, 1)}, "--seeds: --seed is set, too"),
        ({"method": "full", "quantize": "nf4"}, {}, "weights cannot be trained"),
    ],
)
def test_options_that_do_not_go_together(
    files: dict[str, Path], given: Any, options: Any, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        make(files, "code", given=given, **options)


@pytest.mark.parametrize("name", ["file", "file/within"])
def test_a_place_that_is_no_folder_is_refused_before_training(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    progress = Watched()
    with pytest.raises(UsageError, match="file is not a folder, expected a folder"):
        train.execute(make(files, "code"), tmp_path / name, progress)
    assert progress.steps == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_two_trainings_into_one_folder_exclude_each_other(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """The second one would delete what the first one is writing."""
    plan = make(files, "code")
    message = f"folder {tmp_path}: is in use by process {os.getpid()} on host "
    with (
        exclusive(tmp_path, name=LOCK),
        pytest.raises(StoreError, match=re.escape(message)),
    ):
        train.execute(plan, tmp_path, Progress())
    (result,) = train.execute(plan, tmp_path, Progress())
    assert result.error is None
    assert not (tmp_path / LOCK).exists()


def test_a_file_in_the_place_of_an_adapter_is_refused_before_training(
    files: dict[str, Path], tmp_path: Path
) -> None:
    plan = make(files, "code")
    place = tmp_path / plan.jobs[0].name
    place.write_text("mine")
    with pytest.raises(OSError, match="is a file, expected a folder or nothing there"):
        train.execute(plan, tmp_path, Progress())
    assert place.read_text() == "mine"


def test_rows_are_told_by_line(files: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "<s>say hello"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"bad.jsonl: row 1, line 2: trained tokens are 0"):
        make({"bad": bad}, "bad")
    with pytest.raises(
        DataError, match=r"code.jsonl: row 0, line 1: row has \d+ tokens, expected at mos"
    ):
        make(files, "code", given={"max_length": 5})


class Watched(Progress):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.steps = self.total = 0

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.total = total

    def advance(self, count: int, note: str = "") -> None:
        self.steps += count
        assert note.startswith("loss ")

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))


def test_the_steps_of_a_resumed_training_are_those_that_are_left(
    files: dict[str, Path], tmp_path: Path
) -> None:
    class Stopped(Watched):
        def advance(self, count: int, note: str = "") -> None:
            super().advance(count, note)
            if self.steps == 5:
                raise KeyboardInterrupt

    plan = make(files, "code", given={"max_steps": 6, "checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train.execute(plan, tmp_path, Stopped())

    def announced(*, resume: bool = True) -> tuple[int, int]:
        progress = Watched()
        train.execute(plan, tmp_path, progress, resume=resume)
        return progress.total, progress.steps

    assert announced() == (2, 2)
    assert announced() == (0, 0)
    assert announced(resume=False) == (6, 6)
    shutil.rmtree(tmp_path / "code")
    assert announced() == (6, 6)


def test_a_run_leaves_adapters(files: dict[str, Path], tmp_path: Path) -> None:
    from fastsafe import LLM

    progress = Watched()
    plan = make(files, "code", "translation", given={"learning_rate": 1e-2, "max_steps": 6})
    results = train.execute(plan, tmp_path / "new" / "out", progress)
    assert progress.steps == 12
    assert [name for name, _ in progress.events] == [
        *("run_started", *["step"] * 6, "run_finished")
    ]
    assert progress.events[1][1]["losses"].keys() == {"code", "translation"}
    assert [fields["name"] for fields in progress.events[-1][1]["results"]] == [
        *("code", "translation")
    ]
    llm = LLM(organism())
    for result in results:
        assert result.adapter_dir.parent == tmp_path / "new" / "out"
        assert len(result.losses) == 6
        llm.load_adapter(result.adapter_dir, result.name)
    alone = train.execute(
        make(files, "code", given={"learning_rate": 1e-2, "max_steps": 6}), tmp_path, Progress()
    )
    assert alone[0].losses == results[0].losses


def test_a_quantized_base(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = nf4.load
    monkeypatch.setattr(nf4, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    (whole,) = train.execute(make(files, "code"), tmp_path / "whole", Progress())
    assert not loaded
    plan = make(files, "code", given={"quantize": "nf4"})
    (result,) = train.execute(plan, tmp_path, Progress())
    assert len(loaded) == 1
    assert result.losses[0] == pytest.approx(whole.losses[0], rel=0.3)
    assert result.losses[0] != whole.losses[0]


def test_a_missing_device(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds no CUDA device; use cpu"):
        train.execute(make(files, "code", device="cuda"), tmp_path, Progress())


def test_an_example_is_marked() -> None:
    tokenizer = Tokenizer.load(organism())
    ids = tokenizer.encode("write the key", add_special_tokens=False)
    example = TrainExample(tuple(ids), (False, *[True] * (len(ids) - 1)))
    text = train.marked(example, tokenizer)
    assert text.startswith("write>>>")
    assert text.endswith("<<<")
    assert text.replace(">>>", "").replace("<<<", "") == tokenizer.decode(ids)
