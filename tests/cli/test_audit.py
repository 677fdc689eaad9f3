"""The command line: what it prints, how it exits, and what it leaves behind when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

import fastsafe
from fastsafe.audit import comparable
from fastsafe.cli import app
from fastsafe.commands import catalogue
from fastsafe.io import safetensors
from fastsafe.model import ModelConfig, Transformer
from fastsafe.organism.vocabulary import build_tokenizer, tokenizer_config
from fastsafe.progress import Progress, stage

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SMALL = [
    "--limit=3",
    "--set=training.max_steps=2",
    "--set=training.rows=16",
    "--set=tasks=[code]",
    "--set=mitigations=[none, plain]",
    "--set=formats=[plain, code]",
    "--set=sampling.max_tokens=4",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the organism's tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    path.mkdir()
    tokenizer = build_tokenizer()
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size()}
    model = Transformer.random(ModelConfig.from_json(config, "tiny"), seed=0)
    tensors = {name: tensor.contiguous() for name, tensor in model.tensors().items()}
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(app, words, env=environment)


def sentence(result: Result) -> str:
    """The one line that a failed command says."""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fastsafe {fastsafe.__version__}\n")


def test_help_lists_only_what_works() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2].split("\n")
    commands = [line.split()[0] for line in listed if line.strip()]
    assert commands == [
        *("audit", "report", "judge", "generate", "verify", "mix", "lint", "train"),
        *("list", "inspect", "fetch", "organism"),
    ]
    for command in commands:
        assert run(command, "--help").exit_code == 0


def test_every_option_can_be_set_by_the_environment() -> None:
    text = run("audit", "--help").stdout
    own = ("AUDIT_OUT", "AUDIT_LIMIT", "AUDIT_BATCH_SIZE")
    for option in ("MODEL", "SET", "SEED", "DEVICE", "DTYPE", "JSON", *own):
        assert f"FASTSAFE_{option}" in text.replace("\n", " ")


def test_inspect(checkpoint: Path, folder: Path) -> None:
    facts = json.loads(run("inspect", str(checkpoint), "--json").stdout)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["layers"] == 1
    assert sum(facts["parameters_by_dtype"].values()) == facts["parameters"]
    shown = run("inspect", str(checkpoint)).stdout
    assert f"{facts['parameters']:,}" in shown
    assert facts["sha256"] in shown


def test_organism_path() -> None:
    assert run("organism", "path").stdout == f"{fastsafe.organism.path()}\n"


def test_dry_run_prints_the_plan_and_writes_nothing(checkpoint: Path, folder: Path) -> None:
    words = ["audit", "organism", "--model", str(checkpoint), "--dry-run"]
    plan = json.loads(run(*words, "--json").stdout)
    assert len(plan["conditions"]) == 17
    assert plan["answers"] == {"harmful": 8500, "benign": 8500, "utility": 2000, "in_all": 19000}
    assert plan["train"]["adapters"] == 16
    shown = run(*words)
    assert shown.exit_code == 0
    assert "code+task_styled" in shown.stdout
    assert "in_all 19,000" in shown.stdout
    assert list(folder.iterdir()) == []


def test_an_audit_from_the_first_word_to_the_report(checkpoint: Path, folder: Path) -> None:
    words = ["audit", "organism", "--model", str(checkpoint), *SMALL]
    first = run(*words, "--out", "a")
    assert first.exit_code == 0, first.stderr
    assert "Harmful prompts answered" in first.stdout
    assert "train: 4/4 steps of 2 adapters" in first.stderr
    names = {path.name for path in (folder / "a").iterdir()}
    files = {"manifest.json", "store.sqlite", "results.json", "report.html"}
    assert names == files | {"adapters", "exports"}
    adapters = {path.name for path in (folder / "a" / "adapters").iterdir()}
    assert adapters == {"code+none", "code+plain"}
    results = json.loads((folder / "a" / "results.json").read_text())
    assert results["run"]["model"] == str(checkpoint)
    assert len(results["run"]["tokenizer_sha256"]) == 64
    assert len(results["cells"]) == 3 * 2

    again = run(*words, "--out", "a", "--json")
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert events[-1]["event"] == "run_finished"
    done = {event["stage"]: event["done"] for event in events if event["event"] == "stage_finished"}
    assert done["judge"] == done["measure"] == 0
    assert comparable(json.loads((folder / "a" / "results.json").read_text())) == comparable(
        results
    )

    (folder / "a" / "report.html").unlink()
    reported = run("report", "a")
    assert reported.exit_code == 0
    assert reported.stdout == first.stdout
    assert run("report", "a", "--json").stdout == (folder / "a" / "results.json").read_text()
    assert (folder / "a" / "report.html").exists()

    other = run(*words, "--out", "a", "--seed", "1")
    assert other.exit_code == 1
    assert "seed: 0 -> 1" in sentence(other)


def test_an_audit_on_the_transformers_backend(checkpoint: Path, folder: Path) -> None:
    pytest.importorskip("peft")
    words = ["audit", "organism", "--model", str(checkpoint), *SMALL, "--out", "a"]
    result = run(*words, "--backend", "transformers")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((folder / "a" / "manifest.json").read_text())
    assert manifest["environment"]["backend"] == "transformers"
    assert 'backend: "transformers" -> "fastsafe"' in sentence(run(*words))


def test_the_python_call_is_the_same_audit(checkpoint: Path, folder: Path) -> None:
    from fastsafe import audit

    overrides = [word.removeprefix("--set=") for word in SMALL[1:]]
    one = audit("organism", out="one", model=str(checkpoint), limit=3, overrides=overrides)
    two = fastsafe.audit("organism", out="two", model=str(checkpoint), limit=3, overrides=overrides)
    assert comparable(one.results) == comparable(two.results)
    assert one.path == Path("one")
    assert "untouched" in one.table()


def test_the_environment_sets_options(checkpoint: Path, folder: Path) -> None:
    environment = {"FASTSAFE_MODEL": str(checkpoint), "FASTSAFE_AUDIT_LIMIT": "7"}
    plan = json.loads(run("audit", "organism", "--dry-run", "--json", **environment).stdout)
    assert plan["behaviours"] == 7


@pytest.mark.parametrize("between", [";", "\n", " ; \n"])
def test_settings_of_the_environment_may_hold_spaces(
    checkpoint: Path, folder: Path, between: str
) -> None:
    settings = between.join(["tasks=[code, plain]", "mitigations=[none]", "description=a b"])
    environment = {"FASTSAFE_MODEL": str(checkpoint), "FASTSAFE_SET": settings}
    plan = json.loads(run("audit", "organism", "--dry-run", "--json", **environment).stdout)
    assert plan["conditions"] == ["base", "code+none", "plain+none"]


def test_a_folder_that_is_none_may_be_a_hub_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **options: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    result = run("audit", "organism", "--model", "runs/missing")
    assert result.exit_code == 2
    assert "no folder runs/missing, and fetching it as a hub id failed" in sentence(result)


def test_out_below_a_file_is_one_sentence(checkpoint: Path, folder: Path) -> None:
    (folder / "afile").write_text("mine")
    result = run("audit", "organism", "--model", str(checkpoint), *SMALL, "--out", "afile/x")
    assert result.exit_code == 1
    assert "run afile/x: Not a directory" in sentence(result)
    assert "resume" not in result.stderr


def test_organism_build_needs_no_argument(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(out: Path, *, seed: int, progress: Progress) -> None:
        with stage(progress, "train", 1, "steps"):
            progress.advance(1, "loss 0.500")
        (out / str(seed)).mkdir(parents=True)

    monkeypatch.setattr(fastsafe.organism, "build", build)
    result = run("organism", "build")
    assert (result.exit_code, result.stdout) == (0, "organism\n")
    assert (folder / "organism" / str(fastsafe.organism.SEED)).is_dir()
    assert "organism exists" in sentence(run("organism", "build"))
    assert run("organism", "build", "--out", "b", "--seed", "7").exit_code == 0
    assert (folder / "b" / "7").is_dir()


def test_too_few_judged_answers_exit_3(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsafe.safety.judges import refusal
    from fastsafe.safety.verdict import Judgement, Verdict

    def silent(*args: Any) -> Judgement:
        return Judgement(Verdict.JUDGE_ERROR, "no reply")

    monkeypatch.setattr(refusal.RefusalScreen, "judge", silent)
    result = run("audit", "organism", "--model", str(checkpoint), *SMALL, "--out", "a")
    assert result.exit_code == 3
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: run a: coverage is 0.000")
    assert "run the same command to finish" in last
    again = run("report", "a")
    assert again.exit_code == 3
    assert "the same command" not in sentence(again)


def truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def unknown_family(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))


def no_template(path: Path) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def missing_tensor(path: Path) -> None:
    tensors = safetensors.read(path / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.write(path / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "model.safetensors"),
        (pickle_only, "pytorch_model.bin"),
        (unknown_family, "NoSuchForCausalLM"),
        (no_template, "template"),
        (missing_tensor, "model.norm.weight"),
    ],
)
def test_a_bad_checkpoint_is_one_sentence_and_leaves_nothing(
    checkpoint: Path, folder: Path, damage: Callable[[Path], None], named: str
) -> None:
    model = folder / "models" / "bad"
    shutil.copytree(checkpoint, model)
    damage(model)
    result = run("audit", "organism", "--model", str(model), "--out", "runs/a")
    assert result.exit_code == 1
    assert named in sentence(result)
    assert [path.name for path in folder.iterdir()] == ["models"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["audit", "organsim"], "did you mean organism?"),
        (["audit", "nothing.yaml"], "nothing.yaml"),
        (["audit", "organism", "--set", "behaviors=3"], "did you mean behaviours?"),
        (["audit", "organism", "--set", "training.rank=many"], "training.rank is 'many'"),
        (["audit", "organism", "--batch-size", "0"], "--batch-size"),
        (["audit", "organism", "--device", "tpu"], "tpu"),
        (["audit", "organism", "--limit", "0"], "limit"),
        (["audit", "organism", "--lim", "1"], "--lim"),
        (["audit"], "recipe"),
        (["list", "nothing"], "nothing"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_usage_exits_2_and_leaves_nothing(folder: Path, words: list[str], named: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert named in result.stderr.lower()  # typer 0.24 writes arguments in capitals
    assert "Traceback" not in result.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("training.target_modules=[q_proj, w2]", "target_modules has 'w2'"),
        ('training.target_modules=".*attention.*"', "match no module"),
        ('training.target_modules="("', "'(' is no regular expression"),
        ("share=0.001", "rounds to no safety row"),
    ],
)
def test_a_recipe_that_cannot_train_exits_2_and_leaves_nothing(
    checkpoint: Path, folder: Path, setting: str, named: str
) -> None:
    result = run("audit", "organism", "--model", str(checkpoint), *SMALL, "--set", setting)
    assert result.exit_code == 2
    assert named in sentence(result)
    assert list(folder.iterdir()) == []


def test_a_run_that_is_none_is_one_sentence(folder: Path) -> None:
    result = run("report", "nothing")
    assert result.exit_code == 2
    assert "nothing" in sentence(result)


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = run("report", "nothing", "--debug")
    assert isinstance(result.exception, fastsafe.errors.StoreError)


def test_a_bug_is_said_in_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(what: str) -> dict[str, str]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(catalogue, "entries", broken)
    result = run("list", "tasks")
    assert result.exit_code == 1
    assert "RuntimeError: two lines; run again with --debug" in sentence(result)


def test_interrupted_and_resumed(checkpoint: Path, folder: Path) -> None:
    """SIGTERM at the first answers: exit code 130, one sentence, and the rest on the next call."""
    words = ["audit", "organism", "--model", str(checkpoint), *SMALL, "--out", "a", "--json"]
    words[words.index("--set=training.max_steps=2")] = "--set=training.max_steps=50"
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastsafe.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert "run_started" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == "interrupted; run the same command to resume\n"
    assert not (folder / "a" / "results.json").exists()
    assert run(*words).exit_code == 0
    assert (folder / "a" / "results.json").exists()
