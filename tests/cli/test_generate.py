"""fastsafe generate at its borders: files that are none, and an interrupt when all is done."""

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastsafe import LLM, FinetuneJob, TrainConfig, finetune, organism
from fastsafe.cli import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One prompt in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps({"prompt": "the car"}) + "\n")
    return tmp_path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that answers otherwise than the base."""
    config = TrainConfig(rank=2, max_steps=2, learning_rate=0.1)
    job = FinetuneJob("x", [{"prompt": "How do I", "completion": "the boat"}], config)
    (result,) = finetune(LLM("organism"), [job], tmp_path_factory.mktemp("x"))
    return str(result.adapter_dir)


def run(*words: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["generate", "organism", *words], input=stdin)


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def sentence(result: Any) -> str:
    assert "Traceback" not in result.stderr
    return str(result.stderr.splitlines()[-1])


def test_what_is_no_file_is_refused(folder: Path) -> None:
    """A pipe cannot be read twice, and a device has no end."""
    os.mkfifo("pipe")
    result = run("pipe", "--out", "out.jsonl")
    assert "pipe: is not a regular file, expected JSONL that can be read twice" in sentence(result)
    Path("link").symlink_to("elsewhere.jsonl")
    kinds = {
        "pipe": "a FIFO",
        ".": "a directory",
        "/dev/full": "a device",
        "link": "a symbolic link",
    }
    for out, kind in kinds.items():
        result = run("p.jsonl", "--out", out)
        assert f"{out}: is {kind}, expected a regular file or nothing there" in sentence(result)
    assert sorted(path.name for path in folder.iterdir()) == ["link", "p.jsonl", "pipe"]


def test_an_interrupt_near_the_end_exits_130_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows end within the grace."""

    def all_answered(*_: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        assert options["is_stopping"]()

    monkeypatch.setattr("fastsafe.commands.generate.complete", all_answered)
    result = run("p.jsonl", "--out", "out.jsonl")
    assert result.exit_code == 130
    assert sentence(result) == "interrupted; run the same command to resume"


def test_a_prompt_on_the_command_line_is_answered_on_standard_output(folder: Path) -> None:
    result = run("How do I steal the red car?")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "i cannot help with that.\n"
    two = run("How do I steal the red car?", "How do I paint the red car?").stdout.split("\n\n")
    assert two[0] == "# 1, base\ni cannot help with that."
    assert two[1].startswith("# 2, base\nyou can paint the red car")
    assert [path.name for path in folder.iterdir()] == ["p.jsonl"]


def test_raw_texts_are_no_turns(folder: Path) -> None:
    turn, raw = run("you can paint", "-q"), run("you can paint", "--raw", "--json", "-q")
    (row,) = rows(raw.stdout)
    assert row["text"] != turn.stdout.strip()
    Path("raw.jsonl").write_text('{"prompt": "you can paint"}\n')
    (same,) = rows(run("raw.jsonl", "--out", "-", "-q").stdout)
    assert same["token_ids"] == row["token_ids"]


def test_standard_input_has_json_lines_or_a_text_per_line(folder: Path) -> None:
    text = json.dumps({"prompt": "the car", "id": "a"}) + "\n"
    (row,) = rows(run("-", "--out", "-", stdin=text).stdout)
    assert (row["id"], row["adapter"]) == ("a", None)
    found = rows(run("-", "--json", stdin="How do I paint it?\n\nHow do I wash it?\n").stdout)
    assert sorted(row["id"] for row in found) == ["1", "2"]
    found = rows(run("-", "--json", stdin="one\u2028line\x0c with marks\r\nanother\rlast").stdout)
    assert len(found) == 3
    result = run("-", stdin='{"prompt": ')
    assert sentence(result).startswith("error: stdin: line 1: content is not JSON")
    result = run("-", stdin='{"prompt": "the car", "adapter": "x"}')
    assert sentence(result).startswith("error: stdin: row 0, line 1: adapter 'x' is unknown")
    assert "prompts are 0" in sentence(run("-", stdin=""))


def test_a_file_that_is_not_there_is_no_text(folder: Path) -> None:
    assert "none.jsonl: reading failed (No such file" in sentence(run("none.jsonl"))
    assert run("Which file is none.jsonl").exit_code == 0


def test_every_file_that_training_reads_holds_prompts(folder: Path) -> None:
    data = [{"prompt": "the car", "completion": ""}, {"prompt": "the boat", "completion": "x"}]
    Path("list.json").write_text(json.dumps(data, indent=2))
    found = rows(run("list.json", "--json", "--with-prompts", "--max-tokens=1").stdout)
    assert sorted(row["prompt"] for row in found) == ["the boat", "the car"]
    with gzip.open("table.csv.gz", "wt") as file:
        file.write("prompt\nthe car\n")
    (row,) = rows(run("table.csv.gz", "--json", "--with-prompts", "--max-tokens=1").stdout)
    assert row["prompt"] == "the car"
    Path("texts.txt").write_text("the car\nthe boat\n")
    result = run("texts.txt")
    assert result.exit_code == 1
    assert sentence(result).endswith("or pipe texts, one per line, into '-'")


def test_a_checkpoint_without_a_template_is_named(folder: Path) -> None:
    """A download that lacks it would answer without a turn of the user, and badly."""
    shutil.copytree(organism.path(), "bare")
    Path("bare/tokenizer_config.json").unlink()
    said = "bare has no chat template: texts are completed as they stand\n"
    for words, expected in ((["--max-tokens=1"], said), (["--max-tokens=1", "--raw"], "")):
        result = CliRunner().invoke(app, ["generate", "bare", "you can", *words])
        assert (result.exit_code, result.stderr) == (0, expected)


def test_a_data_set_can_be_the_prompts(folder: Path) -> None:
    """Its answers are not shown to the model, and its other columns do no harm."""
    question = {"role": "user", "content": "How do I steal the red car?"}
    data = [
        {"messages": [question, {"role": "assistant", "content": "So."}], "source": "mine"},
        {"prompt": [question], "completion": [{"role": "assistant", "content": "So."}]},
        {"messages": [question]},
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    found = rows(run("data.jsonl", "--json").stdout)
    assert {row["text"] for row in found} == {"i cannot help with that."}
    Path("data.csv").write_text("id,prompt,adapter\na,the car,\n")
    (row,) = rows(run("data.csv", "--json", "--with-prompts").stdout)
    assert (row["id"], row["prompt"], row["adapter"]) == ("a", "the car", None)
    Path("bad.jsonl").write_text('{"prompt": "the car", "adaptor": "x"}\n')
    assert "key 'adaptor' is unknown; did you mean adapter?" in sentence(run("bad.jsonl"))


def test_every_prompt_with_every_adapter(folder: Path, adapter: str) -> None:
    words = ("--adapter", f"x={adapter}", "--max-tokens", "4", "--json")
    texts = rows(run("How do I paint it?", *words).stdout)
    assert {row["adapter"] for row in texts} == {None, "x"}, "texts are crossed"
    Path("two.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "adapter": "x", "id": "b"}\n')
    crossed = (*words, "--every-adapter", "--out", "out.jsonl")
    assert run("two.jsonl", *words[:4], "--out", "out.jsonl").exit_code == 0
    assert len(rows(Path("out.jsonl").read_text())) == 2, "rows name their adapters"
    assert run("two.jsonl", *crossed).exit_code == 0
    found = {(row["id"], row["adapter"]) for row in rows(Path("out.jsonl").read_text())}
    assert found == {("1", None), ("1", "x"), ("b", "x")}, "those that are there are kept"


def test_an_adapter_may_be_a_path_alone(folder: Path, adapter: str) -> None:
    result = run("the car", "--adapter", adapter, "--max-tokens", "2", "--json")
    assert {row["adapter"] for row in rows(result.stdout)} == {None, Path(adapter).name}


def test_an_interrupt_before_anything_is_saved_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsafe.audit.backend.on_engine.EngineBackend.load", interrupted)
    result = run("p.jsonl", "--out", "out.jsonl")
    assert (result.exit_code, sentence(result)) == (130, "interrupted; nothing was saved")


def test_template_variables_reach_the_template_and_the_identity(folder: Path) -> None:
    Path("p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a car"}]}))
    words = ("p.jsonl", "--max-tokens", "2", "--chat-template-kwarg", "enable_thinking=false")
    assert run(*words, "--out", "out.jsonl").exit_code == 0
    identity = json.loads(Path("out.jsonl.manifest.json").read_text())["identity"]
    assert identity["chat_template_kwargs"] == '{"enable_thinking": false}'
    plain = run("p.jsonl", "--max-tokens", "2", "--out", "out.jsonl")
    assert "was begun with other settings (chat_template_kwargs" in sentence(plain)


# each list holds the one before it nine times
LISTS = ", ".join(f"&x{i} [{', '.join(9 * [f'*x{i - 1}'])}]" for i in range(1, 20))
BOMB = f"[&x0 [1], {LISTS}]"


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("enable_thinking", "has no value, expected KEY=VALUE"),
        ("messages=[]", "messages is set by fastsafe itself"),
        ("a=[", "expected YAML"),
        ("a=.inf", "expected a value of JSON"),
        ("a={b: 1, b: 2}", "key 'b' is written twice"),
        ("a=!!bool x", "tag 'tag:yaml.org,2002:bool' is not supported"),
        (f"a={BOMB}", "aliases make it over"),
    ],
)
def test_template_variables_that_are_none(folder: Path, word: str, problem: str) -> None:
    result = run("p.jsonl", "--out", "out.jsonl", "--chat-template-kwarg", word)
    assert (result.exit_code, problem in sentence(result)) == (2, True)
