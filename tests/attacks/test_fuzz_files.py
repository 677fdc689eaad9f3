"""Readers of checkpoints, adapters, runs and replies, fuzzed: accepted, or refused in one sentence.

``FUZZ_CASES`` sets the number of cases of all readers together, and ``FUZZ_SEED`` their seed; a
failure names both, and the fewest changes of a valid value that show it.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, SamplingParams, organism
from fastsafe.audit import run as runs
from fastsafe.io import safetensors
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask
from fastsafe_testing import fake_model as fake
from fastsafe_testing import fuzzing
from fastsafe_testing.fuzz_files import Read, Rng, value
from fastsafe_testing.fuzzing import JSON_RAW, Reader

CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    json.loads((organism.path() / name).read_text("utf-8"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
)


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


def loaded(folder: Path) -> None:
    """Load a checkpoint and generate with it."""
    LLM(folder).generate(["red car"], SamplingParams(max_tokens=2))


def tokenized(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("Paint the red car."))
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat([{"role": "user", "content": "Paint the red car."}])


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
    Reader(
        "template", [[{"role": "user", "content": "Name a colour."}]], value(template), "", (), 20
    ),
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


LOGPROBS = {"content": [{"token": "Yes", "top_logprobs": [{"token": "Yes", "logprob": -0.1}]}]}
REPLIES: list[dict[str, Any]] = [
    {
        "choices": [
            {
                "message": {"role": "assistant", "content": "Final Verdict: 1", "refusal": None},
                "finish_reason": "stop",
                "logprobs": LOGPROBS,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
    },
    {"choices": [{"text": "No", "logprobs": {"top_logprobs": [{"No": -0.1, "Yes": -3}]}}]},
    {"error": {"message": "content filter", "code": "content_filter", "type": None, "param": "n"}},
]
WAITS = ("", "3", "-1", "9" * 400, "Wed, 21 Oct 2099 07:28:00 +9999", "x", "\u00b2", "1e9", "nan")


def test_replies_of_endpoints_are_read_or_are_errors_of_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx2 = pytest.importorskip("httpx2")
    pytest.importorskip("tenacity")
    served: dict[str, Any] = {}  # parts of the response to every call

    def respond(request: Any) -> Any:
        stream = httpx2.ByteStream(served["content"])
        return httpx2.Response(served["status"], headers=served["headers"], stream=stream)

    client = partial(httpx2.AsyncClient, transport=httpx2.MockTransport(respond))
    monkeypatch.setattr(httpx2, "AsyncClient", client)
    messages = ({"role": "user", "content": "A question?"},)
    asks = [
        Ask(key="chat", messages=messages),
        Ask(key="label", messages=messages, labels=("Yes", "No")),
        Ask(key="raw", prompt="A question?", labels=("Yes", "No")),
    ]
    limits = {"max_retries": 0, "max_failures": 99, "max_tokens": 10**9}
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", **limits)

    def make(folder: Path, reply: Any, rng: Rng) -> Callable[[], object]:
        status = rng.choice((200, 200, 200, 200, 400, 401, 404, 422, 429, 500))
        headers = {"retry-after": rng.choice(WAITS).encode()}
        served.update(status=status, headers=headers, content=fuzzing.dumped(reply, rng))
        completer = HttpCompleter(endpoint, folder=folder)

        def read() -> None:
            for found in completer.complete(asks):
                found.text.encode()
                assert all(odds <= 0.001 for odds in found.logprobs)
                assert found.finish != "error" or fuzzing.message_fault(found.text, "") is None
            completer.complete(asks)  # from what was kept
            completer.close()

        return read

    fuzzing.check(Reader("endpoint", REPLIES, make, "", JSON_RAW, 60), tmp_path)


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
            columns = store.execute(f"PRAGMA table_info({table})").fetchall()
            key = ", ".join(name for _, name, *_, place in columns if place)
            column = "value" if table == "meta" else rng.choice(columns)[1]
            rows = store.execute(f"SELECT {column}, {key} FROM {table}").fetchall()
            old, *keys = rng.choice(rows) if rows else (None,)
            cell = json.loads(old) if table == "meta" else old
            cell = fuzzing.changed(cell, fuzzing.changes(cell, rng, JSON_RAW))
            if table == "meta":
                cell = fuzzing.dumped(cell, rng).decode(errors="replace")
            elif not isinstance(cell, bytes | str | float | None):
                cell = fuzzing.dumped(cell, rng)
            with suppress(sqlite3.Error, UnicodeEncodeError):  # what no store can hold
                where = f"({key}) = ({', '.join('?' * len(keys))})"
                store.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (cell, *keys))
                store.commit()
        return partial(runs.report, run)

    with closing(sqlite3.connect(finished / "store.sqlite")) as store:
        tables = [name for (name,) in store.execute(TABLES)]
    fuzzing.check(Reader("store", ["meta", *tables], make, "run", (), 10, False), tmp_path)


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
    fuzzing.check(Reader("manifest", [manifest], make, "run", JSON_RAW, 6), tmp_path)


TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
