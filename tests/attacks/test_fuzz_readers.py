"""Readers of untrusted input, fuzzed: each accepts a value or refuses it in one sentence.

``FUZZ_CASES`` sets the number of cases of all readers together, and ``FUZZ_SEED`` their seed; a
failure names both, and the fewest changes of a valid value that show it.
"""

import csv
import io
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastsafe import LLM, SamplingParams, TrainConfig, organism
from fastsafe.audit import run as runs
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.panel import make_panel
from fastsafe.audit.recipe.load import load
from fastsafe.commands.generate import PromptFile
from fastsafe.commands.lint import lint_file, read_probes
from fastsafe.commands.train_settings import settle, train_config
from fastsafe.data.readers import encode, read_rows
from fastsafe.io import safetensors
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.safety.behaviours import read_behaviours
from fastsafe.safety.benchmarks import read_benchmark
from fastsafe.safety.formats import TranslationTable
from fastsafe.safety.judges import make_judge
from fastsafe.safety.tasks import load_rows, tasks
from fastsafe.yaml_file import read_yaml
from fastsafe_testing import fake_model as fake
from fastsafe_testing import fuzzing
from fastsafe_testing.fuzzing import JSON_RAW, YAML_RAW, Reader

Read = Callable[[Path], object]
Rng = random.Random

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
    {"role": "assistant", "content": "Red.", "reasoning_content": "A warm one."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Blue."},
]
SPOKEN = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]
PAIR = [[{"role": "user", "content": "Name a colour."}], [{"role": "assistant", "content": "Red."}]]
ROWS: list[list[dict[str, Any]]] = [
    [{"messages": TURNS}, {"messages": TURNS[1:3]}],
    [{"messages": TURNS, "tools": [], "source": "safety", "weight": 1.0, "id": "a"}],
    [{"conversations": SPOKEN, "system": "Be brief."}],
    [{"instruction": "Name it.", "input": "red", "output": "A colour.", "history": [["a", "b"]]}],
    [{"prompt": "Name a colour:", "completion": " red"}],
    [dict(zip(("prompt", "completion"), PAIR, strict=True))],
    [{"prompt": [5, 6, 7], "completion": [8, 3]}],
    [{"token_ids": [5, 6, 7], "trained": [False, True, True]}],
    [{"text": "A red car."}],
    [{"question": "Which?", "choices": ["red", "blue"], "answer": 1, "context": ""}],
    [{"article": "The car is red.", "summary": "A red car."}],
    [{"prompt": "Name one.", "chosen": "Red.", "rejected": "No."}],
    [{"chosen": TURNS, "rejected": TURNS}],
]
PROMPTS = [[{"prompt": "Name a colour:", "id": "a"}, {"messages": TURNS[:2], "adapter": "code"}]]
BEHAVIOURS = [
    [
        {"behavior_id": "a", "harmful": "steal the car", "benign": "paint the car"},
        {"harmful": "break in", "benign": "", "category": "theft", "form": "action", "lang": "en"},
    ]
]
FLAGS = {"theft,_fraud": False, "privacy_violation": True}
BENCHMARKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "harmbench.csv": (
        "harmbench",
        [
            dict.fromkeys(("Behavior", "FunctionalCategory", "SemanticCategory"), "placeholder")
            | {"Tags": "", "ContextString": "", "BehaviorID": "a"}
        ],
    ),
    "advbench.csv": ("advbench", [{"goal": "placeholder", "target": "Sure"}]),
    "strongreject.csv": (
        "strongreject",
        [{"category": "c", "source": "s", "forbidden_prompt": "placeholder"}],
    ),
    "xstest.csv": (
        "xstest",
        [
            {"id": "1", "prompt": "p", "type": "homonyms", "label": "safe", "focus": "f"},
            {
                "id": "2",
                "prompt": "q",
                "type": "contrast_homonyms",
                "label": "unsafe",
                "focus": "f",
            },
        ],
    ),
    "beavertails.jsonl": (
        "beavertails",
        [{"prompt": "p", "response": "r", "category": FLAGS, "is_safe": False}],
    ),
}
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m", "max_calls": 3, "price_in": 0.1}
RECIPE: dict[str, Any] = {
    "name": "fuzzed",
    "description": "One task.",
    "model": "organism",
    "source": "auto",
    "tasks": ["code"],
    "styles": ["native"],
    "mitigations": ["none", {"name": "plain", "share": [0.1, 0.2]}],
    "share": 0.1,
    "training": {"rows": 40, "rank": 8, "alpha": 16, "target_modules": ["q_proj"], "seed": 1},
    "drift": {"every": 2, "probes": 3, "refusal": "I cannot", "stop_above": 0.5},
    "formats": ["plain", "code"],
    "system_prompts": {"none": "", "careful": "Be careful."},
    "behaviours": 4,
    "judges": ["refusal", {"kind": "harmbench", "id": "hb", "endpoint": ENDPOINT}],
    "guards": ["keyword"],
    "rewrite": {"endpoint": ENDPOINT, "max_tokens": 64},
    "sampling": {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_tokens": 8},
    "early_stop": {"tokens": 4, "check": 1},
    "data": {"tasks": {"code": "rows.jsonl"}, "behaviours": "behaviours.jsonl"},
    "seed": 3,
    "thresholds": {"coverage": 0.5},
}
SET = {
    f"{section}.{key}" if section else key: value
    for section in ("", "training", "sampling", "drift")
    for key, value in (RECIPE[section] if section else RECIPE).items()
}
SETTINGS = {
    "rank": 8,
    "alpha": 16.0,
    "target_modules": ["q_proj", "v_proj"],
    "dropout": 0.1,
    "learning_rate": 1e-4,
    "schedule": "linear",
    "warmup_ratio": 0.1,
    "epochs": 2,
    "batch_size": 4,
    "loss_on": "completion",
    "drift_every": 5,
    "max_length": 64,
}


def json_lines(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        each = rows if isinstance(rows, list) else [rows]
        path.write_bytes(b"\n".join(fuzzing.dumped(row, rng) for row in each))
        return partial(read, path)

    return make


def json_file(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, value: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        path.write_bytes(fuzzing.dumped(value, rng))
        return partial(read, path)

    return make


def table(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        each = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        columns = list(dict.fromkeys(key for row in each for key in row))
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(columns)
        writer.writerows([fuzzing.table_cell(row.get(key)) for key in columns] for row in each)
        text = file.getvalue().encode(errors="surrogatepass")
        (folder / name).write_bytes(fuzzing.damaged(text, rng))
        return partial(read, folder / name)

    return make


def parquet(read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet as pq

        path = folder / "rows.parquet"
        odd = rng.choice(fuzzing.parquet_columns())
        try:
            whole = pa.Table.from_pylist([*rows, *rows][:2])
            at = rng.randrange(whole.num_columns + 1)
            whole = whole.slice(0, 2)
            if at < whole.num_columns and rng.random() < 0.8:
                whole = whole.set_column(at, whole.column_names[at], odd)
            else:
                whole = whole.append_column("odd", odd)
            pq.write_table(whole, path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            pq.write_table(pa.table({"text": ["a", "b"]}), path)  # a value that no column holds
        path.write_bytes(fuzzing.damaged(path.read_bytes(), rng))
        return partial(read, path)

    return make


def yaml_file(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, value: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        data = fuzzing.dumped(value, rng)
        if rng.random() < 0.3:
            with suppress(yaml.YAMLError, ValueError):  # a raw text is no value
                data = yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
        path.write_bytes(data)
        return partial(read, path)

    return make


def value(read: Callable[[Any], object]) -> fuzzing.Make:
    def make(folder: Path, given: Any, rng: Rng) -> Callable[[], object]:
        return partial(read, given)

    return make


def in_checkpoint(name: str, read: Read) -> fuzzing.Make:
    """Put a value into a file of a copy of the model organism."""

    def make(folder: Path, content: Any, rng: Rng) -> Callable[[], object]:
        for file in Path(organism.path()).iterdir():
            linked(file, folder / file.name)
        (folder / name).unlink()
        (folder / name).write_bytes(fuzzing.dumped(content, rng))
        return partial(read, folder)

    return make


def linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def encoded(path: Path) -> None:
    """Read rows as training does, up to their token ids."""
    encode(read_rows(path), Tokenizer.load(organism.path()), max_length=400, truncate=True)


def recipe(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Read a recipe up to the panel; checkpoints are opened for no judge."""
    checked = load(path, overrides=overrides)
    make_panel(checked, check_recipe(checked))


def override(given: Any) -> None:
    """Set each key; a value that is no mapping any more is the seed's."""
    for key, content in (given if isinstance(given, dict) else {"seed": given}).items():
        text = fuzzing.dumped(content, Rng(0)).decode(errors="replace")
        recipe("organism", [f"{key}={text}"])


def settings_of_training(path: Path) -> None:
    train_config(settle({}, config_file=path), num_rows=10, seed=0)


def keywords(cls: Callable[..., object]) -> Callable[[Any], object]:
    def call(given: Any) -> object:
        known = given if isinstance(given, dict) else {}
        return cls(**{key: item for key, item in known.items() if key in given and key in NAMES})

    return call


NAMES = {
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_token_ids"),
    *("logprobs", "ignore_eos", "rank", "alpha", "target_modules", "dropout", "learning_rate"),
    *("schedule", "warmup_steps", "max_steps", "epochs", "batch_size", "weight_decay"),
    *("max_grad_norm", "loss_on", "shuffle", "objective"),
}
SAMPLING = {
    "max_tokens": 4,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["."],
    "stop_token_ids": [7],
    "logprobs": True,
}
TRAINING = {
    "rank": 4,
    "alpha": 8.0,
    "target_modules": ["q_proj"],
    "dropout": 0.1,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 1,
    "max_steps": 3,
    "batch_size": 2,
    "weight_decay": 0.0,
    "objective": "sft",
}
CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    json.loads((organism.path() / name).read_text("utf-8"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
)


def loaded(folder: Path) -> None:
    """Load a checkpoint and generate with it."""
    LLM(folder).generate(["red car"], SamplingParams(max_tokens=2))


def tokenized(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("Paint the red car."))
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat([{"role": "user", "content": "Paint the red car."}])


def lint(path: Path) -> None:
    lint_file(path)
    read_probes(path)


def lines(path: Path) -> None:
    PromptFile(path, ("code",))


def task_rows(path: Path) -> None:
    load_rows(tasks()["code"], path, "all")


def judge(given: Any) -> None:
    """Make a judge of what a recipe's schema lets through."""
    if isinstance(given, str | dict):
        make_judge(given)


def template(given: Any) -> None:
    """Render messages of any shape with a template that reads all of them."""
    Tokenizer.load(organism.path()).render_chat(given if isinstance(given, list) else [given])


@cache
def base() -> LLM:
    return LLM(organism.path())


def adapter(folder: Path, config: Any, rng: Rng) -> Callable[[], object]:
    """Put a config beside fitting weights of an adapter on two modules."""
    shapes = {"lora_A": (4, 128), "lora_B": (128, 4)}
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.{half}.weight": torch.zeros(shape)
        for layer in (0, 1)
        for name in ("q_proj", "o_proj")
        for half, shape in shapes.items()
    }
    (folder / "adapter").mkdir()
    safetensors.write(folder / "adapter" / "adapter_model.safetensors", tensors)
    (folder / "adapter" / "adapter_config.json").write_bytes(fuzzing.dumped(config, rng))

    def read() -> None:
        base().load_adapter(folder / "adapter", "fuzzed")
        base().unload_adapter("fuzzed")

    return read


ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "o_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layers_pattern": None,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {r"layers\.0\..*": 8},
    "layers_to_transform": [0, 1],
    "exclude_modules": ["lm_head"],
    "revision": None,
}


READERS = [
    Reader("jsonl", ROWS, json_lines("rows.jsonl", encoded), "rows.jsonl", JSON_RAW, 180),
    Reader("json", ROWS, json_file("rows.json", encoded), "rows.json", JSON_RAW, 40),
    Reader("csv", ROWS, table("rows.csv", encoded), "rows.csv", (), 40),
    Reader("tsv", ROWS, table("rows.tsv", encoded), "rows.tsv", (), 20),
    Reader("parquet", ROWS, parquet(encoded), "rows.parquet", (), 50),
    Reader("lint", ROWS, json_lines("rows.jsonl", lint), "rows.jsonl", JSON_RAW, 40),
    Reader("prompts", PROMPTS, json_lines("p.jsonl", lines), "p.jsonl", JSON_RAW, 40),
    Reader("behaviours", BEHAVIOURS, json_lines("b.jsonl", read_behaviours), "b.jsonl", (), 30),
    Reader(
        "translations",
        [[{"text": "red", "translation": "rouge"}]],
        json_lines("t.jsonl", TranslationTable.read),
        "t.jsonl",
        (),
        10,
    ),
    *(
        Reader(
            f"benchmark {name}",
            [rows],
            (table if name.endswith("csv") else json_lines)(file, partial(read_benchmark, name)),
            file,
            (),
            10,
        )
        for file, (name, rows) in BENCHMARKS.items()
    ),
    Reader("recipe", [RECIPE], yaml_file("r.yaml", recipe), "", YAML_RAW, 150),
    Reader("yaml", [RECIPE], yaml_file("r.yaml", read_yaml), "r.yaml", YAML_RAW, 20),
    Reader("set", [{key: item} for key, item in SET.items()], value(override), "", YAML_RAW, 40),
    Reader(
        "train settings", [SETTINGS], yaml_file("t.yaml", settings_of_training), "", YAML_RAW, 40
    ),
    Reader("TrainConfig", [TRAINING], value(keywords(TrainConfig)), "", (), 20),
    Reader("SamplingParams", [SAMPLING], value(keywords(SamplingParams)), "SamplingParams", (), 20),
    Reader("judge", RECIPE["judges"], value(judge), "", (), 20),
    Reader(
        "config.json", [CONFIG], in_checkpoint("config.json", loaded), "config.json", JSON_RAW, 40
    ),
    Reader(
        "tokenizer.json",
        [TOKENIZER],
        in_checkpoint("tokenizer.json", tokenized),
        "tokenizer",
        JSON_RAW,
        20,
    ),
    Reader(
        "tokenizer_config.json",
        [TOKENIZER_CONFIG],
        in_checkpoint("tokenizer_config.json", tokenized),
        "",
        JSON_RAW,
        40,
    ),
    Reader("adapter_config.json", [ADAPTER], adapter, "adapter", JSON_RAW, 40),
    Reader("template", [TURNS], value(template), "", (), 20),
    Reader(
        "generation_config.json",
        [GENERATION],
        in_checkpoint("generation_config.json", tokenized),
        "",
        JSON_RAW,
        10,
    ),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers_accept_or_refuse_in_one_sentence(reader: Reader, tmp_path: Path) -> None:
    fuzzing.check(reader, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its store folded into one file."""
    path = tmp_path_factory.mktemp("finished") / "run"
    fake.small_run(path, behaviours=4)
    return path


def test_stores_are_read_or_refused_in_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell of the store is changed: JSON within, other cells as a whole."""
    monkeypatch.setattr("fastsafe.audit.report.heatmap_svg", lambda results: "<svg/>")

    def make(folder: Path, table: Any, rng: Rng) -> Callable[[], object]:
        run = folder / "run"
        shutil.copytree(finished, run)
        with closing(sqlite3.connect(run / "store.sqlite")) as store:
            store.execute("PRAGMA ignore_check_constraints = 1")
            columns = [row[1] for row in store.execute(f"PRAGMA table_info({table})")]
            column = "value" if table == "meta" else rng.choice(columns)
            rows = store.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
            rowid, old = rng.choice(rows) if rows else (0, None)
            cell = json.loads(old) if table == "meta" else old
            cell = fuzzing.changed(cell, fuzzing.changes(cell, rng, JSON_RAW))
            if table == "meta":
                cell = fuzzing.dumped(cell, rng).decode(errors="replace")
            elif not isinstance(cell, bytes | str | float | None):
                cell = fuzzing.dumped(cell, rng)
            with suppress(sqlite3.Error, UnicodeEncodeError):  # what no store can hold
                store.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (cell, rowid))
                store.commit()
        return partial(runs.report, run)

    with closing(sqlite3.connect(finished / "store.sqlite")) as store:
        tables = [name for (name,) in store.execute(TABLES)]
    fuzzing.check(Reader("store", ["meta", *tables], make, "run", (), 20, False), tmp_path)


def test_manifests_are_read_or_refused_in_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsafe.audit.report.heatmap_svg", lambda results: "<svg/>")

    def make(folder: Path, content: Any, rng: Rng) -> Callable[[], object]:
        shutil.copytree(finished, folder / "run")
        (folder / "run" / "manifest.json").write_bytes(fuzzing.dumped(content, rng))
        thresholds = [f"thresholds.coverage={rng.random()}"]  # a new one revises the manifest
        return partial(runs.judge, folder / "run", overrides=thresholds)

    manifest = json.loads((finished / "manifest.json").read_text("utf-8"))
    fuzzing.check(Reader("manifest", [manifest], make, "run", JSON_RAW, 10), tmp_path)


TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
