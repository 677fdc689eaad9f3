"""``fastsafe train``: what it prints, how it exits, what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fastsafe
from fastsafe.cli import app
from fastsafe.commands.train_settings import TYPES

FEW = ("--rank=2", "--max-steps=2", "--batch-size=4")


def run(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["train", *words], env=environment)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows of questions and answers in the organism's words, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"write the {x}", "a": f"the {x}", "id": x} for x in ("key", "code", "solid key")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


MAPPED = "--map=user=q,assistant=a"


def test_a_base_and_data_to_an_adapter(data: str) -> None:
    result = run("organism", data, MAPPED, *FEW, "--name=mine")
    assert result.exit_code == 0, result.stderr
    assert "  Mapping found: mapped (q, a), 3 rows; left out: id\n" in result.stdout
    assert "job mine: 3 rows, 2 steps, 0 of warm-up, seed 0\n" in result.stdout
    assert "memory: 0.3 MiB per job for 19,456 trained parameters\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("adapters/mine: 2 steps, ")
    assert {p.name for p in Path("adapters/mine").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }
    assert "train: 2/2 steps in" in result.stderr


def test_seeds_are_jobs(data: str) -> None:
    result = run("organism", data, MAPPED, *FEW, "--seeds=0, 2", "--out=here")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in Path("here").glob("[!.]*")) == ["rows-seed0", "rows-seed2"]


@pytest.mark.parametrize("seeds", ["a", "1,1", "", "-1", "0,"])
def test_seeds_that_are_none(data: str, seeds: str) -> None:
    result = run("organism", data, f"--seeds={seeds}")
    assert result.exit_code == 2
    assert "expected different numbers such as 0,1,2" in result.stderr


def test_events_for_machines(data: str) -> None:
    result = run("organism", data, MAPPED, *FEW, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "note"]
    assert kinds[:2] == ["run_started", "stage_started"]
    assert kinds[-1] == "run_finished"
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2]
    (last,) = events[-1]["results"]
    assert last["last_loss"] == steps[-1]["losses"]["rows"]
    assert last["path"] == "adapters/rows"


def test_drift_is_read_while_training(data: str) -> None:
    Path("probes.jsonl").write_text('{"harmful": "break the key", "benign": "make the key"}\n')
    drift = ("--drift-every=1", "--drift-probes=probes.jsonl", "--drift-refusal=i cannot")
    words = ("organism", data, MAPPED, *FEW, *drift, "--learning-rate=0.1")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("drift of")]
    assert [line.partition(":")[0] for line in lines] == [
        *("drift of rows after 1 steps", "drift of rows after 2 steps")
    ]
    result = run(*words, "--out=stopped", "--drift-stop-above=1e-9")
    assert result.stdout.endswith(", stopped early as it drifted too far\n")
    result = run(*words, "--out=events", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    readings = [event for event in events if event["event"] == "drift"]
    assert [(r["job"], r["step"]) for r in readings] == [("rows", 1), ("rows", 2)]
    assert f"KL {readings[1]['kl']:.3f} nats, margin {readings[1]['margin']:+.2f}" in lines[1]
    assert events[-1]["results"][0]["stopped_early"] is False
    weights = [Path(out, "rows", "adapter_model.safetensors") for out in ("adapters", "events")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--drift-every=-1"], "drift_every is -1, expected a number of steps, 0 for none"),
        (["--drift-every=1", "--drift-probes=gone.jsonl"], "gone.jsonl: "),
        (["--drift-every=1", "--drift-probes=tame.jsonl"], "tame.jsonl: no row has a harmful side"),
        (["--drift-every=1", "--drift-refusal="], "an opening has no token"),
        (["--drift-every=1", "--drift-stop-above=-1"], "max_kl is -1.0, expected more than 0"),
    ],
)
def test_drift_that_cannot_be_read(data: str, words: list[str], sentence: str) -> None:
    Path("tame.jsonl").write_text('{"harmful": "", "benign": "make the key"}\n')
    result = run("organism", data, MAPPED, *FEW, *words)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr
    assert not list(Path("adapters").rglob("adapter_model.safetensors"))


def test_a_dry_run_prints_the_preset_and_writes_nothing(data: str) -> None:
    words = ("organism", data, MAPPED, "--preset=paper1", "--rank=8", "--dry-run")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "    rank = 64  (verified)",
        "  rank            8  (given; preset paper1 (verified) has 64)",
        "  truncate        true  (preset paper1 (verified))",
        "    group_by_length = true  (verified; it saves padding, of which there is none here; "
        "rows are shuffled instead, so the batches differ)",
        "job rows: 3 rows, 3,000 steps, 90 of warm-up, seed 0",
    ):
        assert " ".join(line.split()) in shown
    facts = json.loads(run(*words, "--json").stdout)
    assert facts["jobs"][0]["warmup_steps"] == 90
    assert os.listdir() == ["rows.jsonl"]


def test_a_preset_that_does_not_exist(data: str) -> None:
    result = run("organism", data, "--preset=paper3")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --preset: 'paper3' does not exist, expected paper1 or paper2\n"
    )


def test_an_example_shows_what_is_trained(data: str) -> None:
    result = run("organism", data, MAPPED, "--show-example")
    assert result.exit_code == 0
    assert result.stdout == (
        "<s><|im_start|>user\nwrite the key<|im_end|>\n<|im_start|>assistant\n"
        ">>>the key<|im_end|><<<\n\n"
    )
    assert os.listdir() == ["rows.jsonl"]


def test_text_that_the_vocabulary_lacks_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(
        '{"prompt": "paint", "completion": "qqxx"}\n{"prompt": "paint", "completion": " car."}\n'
    )
    shown = run("organism", str(path), "--show-example")
    assert "<unk>" in shown.stdout
    assert "in 1 of 2 rows are unknown to the vocabulary" in shown.stderr
    words = ("organism", str(path), "--max-steps", "1", "--dry-run")
    assert "in 1 of 2 rows are unknown to the vocabulary" in run(*words).stdout
    (facts,) = json.loads(run(*words, "--json").stdout)["data"]
    assert facts["unknown_rows"] == 1
    assert facts["unknown_tokens"] >= 1


def test_a_bad_row_is_named_and_nothing_is_written(data: str) -> None:
    with Path(data).open("a") as file:
        file.write('{"q": "x"}\n')
    result = run("organism", data, MAPPED, *FEW)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: rows.jsonl: row 3, line 4: a is missing, expected a row of shape mapped like the "
        "first one; correct or remove it\n"
    )
    assert os.listdir() == ["rows.jsonl"]


def test_settings_from_a_file_and_the_environment(data: str) -> None:
    Path("s.yaml").write_text("rank: 4\nalpha: 2\nobjective: sft\n")
    words = ("organism", data, MAPPED, "--config=s.yaml", "--dry-run", "--json")
    facts = json.loads(run(*words, FASTSAFE_ALPHA="3", FASTSAFE_TARGET_MODULES="q_proj").stdout)
    assert facts["settings"]["rank"] == {"value": 4, "origin": "s.yaml"}
    assert facts["settings"]["alpha"] == {"value": 3, "origin": "given; s.yaml has 2.0"}
    assert facts["settings"]["target_modules"]["value"] == ["q_proj"]


def test_an_objective_that_is_not_json(data: str) -> None:
    result = run("organism", data, MAPPED, "--objective={name")
    assert result.exit_code == 2
    assert "--objective: '{name' is not JSON" in result.stderr


def test_every_option_can_be_set_by_the_environment() -> None:
    text = run("--help").stdout
    for option in (
        "TRAIN_OUT",
        "RANK",
        "SEEDS",
        "MAP",
        "TRUNCATE",
        "RESUME",
        "SHOW_EXAMPLE",
        "DRY_RUN",
    ):
        assert f"FASTSAFE_{option}" in text


def test_every_setting_is_an_option() -> None:
    text = " ".join(run("--help").stdout.split())
    for name in TYPES.keys() - {"warmup_ratio", "chat_template_kwargs"}:
        assert f"--{name.replace('_', '-')} " in text
    assert "--chat-template-kwarg " in text
    for words in ("Rank of the adapter.", "names are separated by commas", "nf4 holds the base"):
        assert words in text


def test_ctrl_c_leaves_nothing_half_written(data: str) -> None:
    script = "import sys; sys.argv[0] = 'fastsafe'; from fastsafe.cli import main; main()"
    words = ("train", "organism", data, MAPPED, "--max-steps=100000", "--json")
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert error == "interrupted; nothing was saved\n"
    assert not list(Path().rglob("*.safetensors"))
    assert not list(Path().rglob(".tmp-*"))


def test_template_variables_shape_the_rows(data: str, tmp_path: Path) -> None:
    """The same variables as generate takes, on the command line or in a file."""
    model = tmp_path / "model"
    shutil.copytree(fastsafe.organism.path(), model)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with_variable = template.replace("{{ m.content }}", "{{ m.content }}{{ ending }}")
    (model / "chat_template.jinja").write_text(with_variable)
    words = (str(model), data, MAPPED, "--show-example")
    given = run(*words, "--chat-template-kwarg", "ending=' the key'")
    begin, answer = "<|im_start|>write the key the key<|im_end|><|im_start|>", "the key the key"
    assert given.stdout == f"{begin}>>>{answer}<|im_end|><<<\n"
    Path("c.yaml").write_text("chat_template_kwargs: {ending: ' the key'}\n")
    assert run(*words, "--config", "c.yaml").stdout == given.stdout
    assert "key the key" not in run(*words).stdout
    refused = run(*words, "--chat-template-kwarg", "messages=[]")
    assert refused.exit_code == 2
    assert "messages is set by fastsafe itself" in refused.stderr
