"""fastsafe generate: prompts in, completions out, resumed, refused and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fastsafe
from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.cli import app
from fastsafe.cli import generate as command
from fastsafe.commands import generate as module
from fastsafe.commands.generate import PromptFile, complete, open_completions
from fastsafe.errors import DataError, StoreError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"How do I paint the {colour} {thing}?"}]}
    for colour in ("red", "blue", "old")
    for thing in ("car", "boat")
] + [{"prompt": "How do I", "id": "free", "adapter": "x"}, {"prompt": "the car", "id": 7}]


@pytest.fixture(scope="session")
def organism() -> LLM:
    return LLM(fastsafe.organism.path())


@pytest.fixture(scope="session")
def adapter(organism: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained for two steps."""
    config = TrainConfig(rank=2, max_steps=2, learning_rate=0.1)
    job = FinetuneJob("x", [{"prompt": "How do I", "completion": "the boat"}], config)
    return finetune(organism, [job], tmp_path_factory.mktemp("x"))[0].adapter_dir


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("p.jsonl", ROWS)
    return tmp_path


def write(name: str, rows: Sequence[Any]) -> Path:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["generate", *words])


def sentence(result: Any) -> str:
    assert "Traceback" not in result.stderr
    return str(result.stderr.splitlines()[-1])


def organism_words(adapter: Path) -> list[str]:
    return ["organism", "p.jsonl", "--adapter", f"x={adapter}", "--max-tokens", "12"]


def test_completions_are_those_of_the_engine(folder: Path, organism: LLM, adapter: Path) -> None:
    result = run(*organism_words(adapter), "--out", "out.jsonl", "--logprobs")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "8 completions in out.jsonl\n"
    found = {row["id"]: row for row in lines("out.jsonl")}
    assert set(found) == {*map(str, range(1, 7)), "free", "7"}
    params = SamplingParams(max_tokens=12, logprobs=True)
    wanted = organism.chat([row["messages"] for row in ROWS[:6]], params)
    wanted += organism.generate(["the car"], params)
    for key, out in zip([*map(str, range(1, 7)), "7"], wanted, strict=True):
        row = found[key]
        assert (row["text"], tuple(row["token_ids"])) == (out.text, out.token_ids)
        assert (row["finish_reason"], row["adapter"]) == (out.finish_reason, None)
        assert tuple(row["logprobs"]) == out.logprobs
    assert found["free"]["adapter"] == "x"
    manifest = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert manifest["identity"]["sampling"]["max_tokens"] == 12
    assert manifest["identity"]["backend"] == "fastsafe"
    assert manifest["environment"]["torch"]


def test_a_second_call_answers_what_is_new(folder: Path, adapter: Path) -> None:
    words = [*organism_words(adapter), "--out", "out.jsonl", "--json"]
    assert run(*words).exit_code == 0
    first = Path("out.jsonl").read_bytes()
    write("p.jsonl", [{"prompt": "a boat", "id": "new"}, *ROWS[6:]])
    events = [json.loads(line) for line in run(*words).stdout.splitlines()]
    assert {k: events[-1][k] for k in ("event", "rows", "skipped", "errors")} == {
        "event": "generated",
        "rows": 1,
        "skipped": 2,
        "errors": 0,
    }
    assert Path("out.jsonl").read_bytes().startswith(first)
    assert lines("out.jsonl")[-1]["id"] == "new"


@pytest.mark.parametrize("damage", [b'{"id": "fr', b"\x00\xff", b"{}\n", b"[1]\n"])
def test_a_damaged_last_line_is_cut_off(folder: Path, adapter: Path, damage: bytes) -> None:
    words = [*organism_words(adapter), "--out", "out.jsonl"]
    assert run(*words).exit_code == 0
    whole = lines("out.jsonl")
    kept = Path("out.jsonl").read_bytes().splitlines(keepends=True)[:-2]
    Path("out.jsonl").write_bytes(b"".join(kept) + damage)
    assert run(*words).exit_code == 0
    by_id = {row["id"]: row for row in lines("out.jsonl")}
    assert by_id == {row["id"]: row for row in whole}


def test_damage_in_the_middle_is_refused(folder: Path, adapter: Path) -> None:
    words = [*organism_words(adapter), "--out", "out.jsonl"]
    assert run(*words).exit_code == 0
    text = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text("{broken\n" + text)
    result = run(*words)
    assert result.exit_code == 1
    assert "line 1 is not a completion" in sentence(result)
    assert Path("out.jsonl").read_text() == "{broken\n" + text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--temperature", "0.5"], "sampling.temperature: 0.0 -> 0.5"),
        (["--quantize", "nf4"], 'quantize: null -> "nf4"'),
        (["--max-tokens", "13"], "sampling.max_tokens: 12 -> 13"),
        (["--adapters", "mixed"], 'applied: "merged" -> "mixed"'),
        (["--backend", "transformers"], 'backend: "fastsafe" -> "transformers"'),
        (["--adapter", "y=ADAPTER"], "adapters.y: null -> "),
    ],
)
def test_other_settings_are_refused(
    folder: Path, adapter: Path, change: list[str], named: str
) -> None:
    words = [*organism_words(adapter), "--out", "out.jsonl"]
    assert run(*words).exit_code == 0
    before = Path("out.jsonl").read_bytes()
    if change[0] == "--max-tokens":  # an option is given once
        at = words.index(change[0])
        del words[at : at + 2]
    result = run(*words, *[word.replace("ADAPTER", str(adapter)) for word in change])
    assert result.exit_code == 1
    assert named in sentence(result)
    assert Path("out.jsonl").read_bytes() == before


def test_a_prompt_that_changed_under_its_id_is_refused(folder: Path, adapter: Path) -> None:
    words = [*organism_words(adapter), "--out", "out.jsonl"]
    assert run(*words).exit_code == 0
    write("p.jsonl", [*ROWS[:-1], {"prompt": "the boat", "id": 7}])
    assert "line 8: id '7' has a completion of another prompt" in sentence(run(*words))


def test_a_file_of_somebody_else_is_left_alone(folder: Path, adapter: Path) -> None:
    Path("out.jsonl").write_text("mine\n")
    result = run(*organism_words(adapter), "--out", "out.jsonl")
    assert result.exit_code == 1
    assert "exists without out.jsonl.manifest.json" in sentence(result)
    assert Path("out.jsonl").read_text() == "mine\n"


BAD = [
    ("{", "is not JSON"),
    ("[1]", "row is list, expected an object"),
    ('{"promt": "a"}', "did you mean prompt?"),
    ("{}", "both or neither"),
    ('{"prompt": "a", "messages": []}', "both or neither"),
    ('{"prompt": ""}', "prompt is ''"),
    ('{"prompt": 3}', "prompt is 3"),
    ('{"messages": [{"role": "x", "content": "a"}]}', "messages[0] has role"),
    ('{"prompt": "a", "adapter": "y"}', "adapter 'y' is unknown"),
    ('{"prompt": "a", "adapter": ["x"]}', "adapter ['x'] is unknown"),
    ('{"prompt": "a", "id": null}', "id is None"),
    ('{"prompt": "a", "id": "1"}', "id '1' is that of line 1"),
]


@pytest.mark.parametrize(("line", "named"), BAD)
def test_a_bad_line_is_named_before_anything_is_written(
    folder: Path, line: str, named: str
) -> None:
    Path("bad.jsonl").write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    result = run("organism", "bad.jsonl", "--out", "sub/out.jsonl")
    assert result.exit_code == 1
    assert "line 3: " in sentence(result)
    assert named in sentence(result)
    assert not Path("sub").exists()


def test_a_prompt_that_is_too_long_is_named(folder: Path) -> None:
    write("long.jsonl", [{"prompt": "the car"}, {"prompt": "the car " * 400}])
    result = run("organism", "long.jsonl", "--out", "out.jsonl")
    assert "long.jsonl: line 2: the prompt is 8" in sentence(result)
    write("odd.jsonl", [{"prompt": "the car"}, {"prompt": "\ud800"}])
    result = run("organism", "odd.jsonl", "--out", "other.jsonl")
    assert "odd.jsonl: line 2: " in sentence(result)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--adapter", "x"], "--adapter: it is 'x', expected NAME=PATH"),
        (["--adapter", "x=a", "--adapter", "x=b"], "'x' is given twice"),
        (["--batch-size", "none"], "--batch-size"),
        (["--backend", "transformers", "--fast"], "--fast and --adapters"),
        (["--backend", "transformers", "--adapters", "mixed"], "--fast and --adapters"),
        (["--top-p", "0"], "top_p is 0.0"),
    ],
)
def test_wrong_usage_exits_2(folder: Path, words: list[str], named: str) -> None:
    write("one.jsonl", [{"prompt": "a"}])
    result = run("organism", "one.jsonl", "--out", "out.jsonl", *words)
    assert result.exit_code == 2
    assert named in sentence(result)
    assert not Path("out.jsonl").exists()


def test_every_backend_gives_the_same_answers(folder: Path, adapter: Path) -> None:
    pytest.importorskip("peft")
    for backend in ("fastsafe", "transformers"):
        words = [*organism_words(adapter), "--backend", backend, "--temperature", "0.8"]
        assert run(*words, "--out", f"{backend}.jsonl").exit_code == 0
    key = lambda row: row["id"]  # noqa: E731
    one, two = (sorted(lines(f"{b}.jsonl"), key=key) for b in ("fastsafe", "transformers"))
    assert one == two


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_windows_and_order_do_not_matter(
    tmp_path: Path, organism: LLM, data: st.DataObject
) -> None:
    """Any order of any subset, in any windows, resumed at any line: the same sampled answers."""
    asked = [{"prompt": f"the {word}", "id": word} for word in ("car", "boat", "red", "old", "a")]
    order = data.draw(st.permutations(asked))
    path = tmp_path / "p.jsonl"
    out = tmp_path / "out.jsonl"
    for left in (out, out.with_name("out.jsonl.manifest.json")):
        left.unlink(missing_ok=True)
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    for count in (data.draw(st.integers(1, 5)), 5):
        path.write_text("".join(json.dumps(row) + "\n" for row in order[:count]))
        prompts = PromptFile(path, ())
        with (
            open_completions(out, {"a": 1}, {}) as completions,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(module, "WINDOW_ROWS", data.draw(st.integers(1, 6)))
            complete(organism, prompts, completions, params)
    found = {row["id"]: row["text"] for row in map(json.loads, out.read_text().splitlines())}
    global EXPECTED
    EXPECTED = EXPECTED or found
    assert found == EXPECTED
    assert len(set(found)) == 5


EXPECTED: dict[str, str] = {}


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (
        open_completions(tmp_path / "out", {}, {}),
        pytest.raises(StoreError, match="is in use by another process"),
        open_completions(tmp_path / "out", {}, {}),
    ):
        pass


def test_stopping_between_windows(
    tmp_path: Path, organism: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").write_text("".join(f'{{"prompt": "a", "id": {i}}}\n' for i in range(9)))
    prompts = PromptFile(tmp_path / "p", ())
    params = SamplingParams(max_tokens=1)
    asked = iter([False, False, True])
    monkeypatch.setattr(module, "WINDOW_ROWS", 2)
    with (
        open_completions(tmp_path / "out", {}, {}) as completions,
        pytest.raises(KeyboardInterrupt),
    ):
        complete(organism, prompts, completions, params, is_stopping=lambda: next(asked))
    assert len((tmp_path / "out").read_text().splitlines()) == 4


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with open_completions(tmp_path / "out", {}, {}) as completions:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left on device; make room"):
            completions.add({"id": "1"})


def test_a_broken_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out.manifest.json").write_text("{}")
    with (
        pytest.raises(StoreError, match="has no identity"),
        open_completions(tmp_path / "out", {}, {}),
    ):
        pass
    (tmp_path / "out.manifest.json").write_text("{")
    with pytest.raises(StoreError, match="use another"), open_completions(tmp_path / "out", {}, {}):
        pass


def test_no_prompt_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"none\.jsonl: prompts are 0, expected one or more"):
        PromptFile(path, ())


def test_prompts_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reading failed \(No such file"):
        PromptFile(tmp_path / "none", ())
    (tmp_path / "p").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: content is not JSON"):
        PromptFile(tmp_path / "p", ())


def start(*words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which has answered something when this returns."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastsafe.cli import main; main()", "generate", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while not Path("out.jsonl").exists() or Path("out.jsonl").stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


MANY = ["organism", "many.jsonl", "--out", "out.jsonl", "--max-tokens", "12", "--batch-size", "16"]


@pytest.fixture
def many(folder: Path) -> list[str]:
    """Command line of more prompts than a test waits for."""
    write("many.jsonl", [{"prompt": f"the car {'a ' * (i % 50)}"} for i in range(20_000)])
    return MANY


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_drains_and_exits_130(many: list[str], number: signal.Signals) -> None:
    process = start(*many)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping within 3 seconds; again to stop at once" in errors
    assert errors.splitlines()[-1] == "interrupted; run the same command to resume"
    assert lines("out.jsonl"), "every line is whole"


def test_a_second_interrupt_ends_at_once(many: list[str]) -> None:
    process = start(*many)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == command.EXIT_INTERRUPTED
    assert lines("out.jsonl")


def test_killed_and_run_again_equals_unbroken(folder: Path) -> None:
    write("many.jsonl", [{"prompt": f"the car {'a ' * (i % 50)}"} for i in range(200)])
    words = [*MANY, "--temperature", "1"]
    process = start(*words)
    process.kill()
    process.communicate()
    broken = len(Path("out.jsonl").read_bytes().splitlines())
    assert run(*words).exit_code == 0
    whole = [word.replace("out.jsonl", "whole.jsonl") for word in words]
    assert run(*whole).exit_code == 0
    key = lambda row: int(row["id"])  # noqa: E731
    assert broken > 0
    assert sorted(lines("out.jsonl"), key=key) == sorted(lines("whole.jsonl"), key=key)
