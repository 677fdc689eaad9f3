"""The names of ``import fastsafe``, and what they take and say in a notebook."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import fastsafe
from fastsafe import LLM, Completion, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.errors import AdapterError, CheckpointError, DataError, RecipeError, UsageError

SMALL = {"training": {"max_steps": 2, "rows": 16}, "sampling.max_tokens": 4}
PARTS = {"tasks": ["code"], "formats": ["plain"], "mitigations": ["none"]}


@pytest.fixture(scope="module")
def organism() -> LLM:
    return LLM("organism", device="auto")


def test_the_public_names_are_listed_and_there() -> None:
    assert set(fastsafe.__all__) <= set(dir(fastsafe))
    assert not {"import_module", "Any", "TYPE_CHECKING"} & set(dir(fastsafe))
    for name in fastsafe.__all__:
        assert getattr(fastsafe, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastsafe.nothing


def test_an_audit_takes_paths_and_mappings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsafe")
    events: list[dict[str, Any]] = []
    options = {"limit": 2, "overrides": SMALL | PARTS, "out": tmp_path / "run"}
    run = fastsafe.audit("organism", model=fastsafe.organism.path(), **options)
    assert "train: 2/2" in caplog.text
    assert repr(run).startswith(f"Run({str(tmp_path / 'run')!r}, 2 conditions, finished")
    assert "<pre>" in run._repr_html_()
    again = fastsafe.audit("organism", model="organism", progress=events.append, **options)
    assert fastsafe.audit is not None
    assert again.results["cells"] == run.results["cells"], "the same plan, by either name"
    assert {"run_started", "run_finished"} <= {event["event"] for event in events}
    assert fastsafe.report(str(tmp_path / "run")).results["cells"] == run.results["cells"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("a.b=1", "overrides is 'a.b=1', expected a mapping or a list of texts"),
        ({"training.max_step": 1}, "max_step"),
        ({"model.x": 1}, "overrides: model.x goes into 'model', which is not a section"),
    ],
)
def test_wrong_overrides_are_named(overrides: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        fastsafe.audit("organism", overrides=overrides, out=tmp_path / "run")
    assert named in str(caught.value)
    assert "--set" not in str(caught.value)


def test_labels_must_tell_apart(organism: LLM) -> None:
    prompts = ["you can paint the"]
    for labels, named in (
        (["red"], "label 0 is 'red', which the tokenizer does not know"),
        ([" red", " car", " red"], "labels 0 and 2, ' red' and ' red', are both token"),
        ([" red car"], "label 0 is ' red car', which is 2 tokens"),
    ):
        with pytest.raises(UsageError) as caught:
            organism.label_logprobs(prompts, labels)
        assert named in str(caught.value)
    ((red, car),) = organism.label_logprobs(prompts, [" red", " car"])
    assert red != car


def test_a_conversation_has_known_roles(organism: LLM) -> None:
    with pytest.raises(DataError, match=r"conversation 0: messages\[0\] has role 'user2'"):
        organism.chat([[{"role": "user2", "content": "How do I paint the car?"}]])


def test_representations_are_short(organism: LLM) -> None:
    long = Completion(
        text="a" * 999,
        token_ids=(1,) * 999,
        logprobs=None,
        finish_reason="stop",
        num_prompt_tokens=1,
    )
    assert len(repr(long)) < 120
    assert "999 tokens" in repr(long)
    assert repr(organism).endswith("float32, adapters: none)")


def test_a_closed_model_says_so() -> None:
    with LLM(fastsafe.organism.path()) as llm:
        assert llm.generate(["the car"], SamplingParams(max_tokens=1))
    assert repr(llm).endswith("closed)")
    with pytest.raises(UsageError, match="is closed, expected an open one"):
        llm.generate(["the car"])
    assert not hasattr(llm, "nothing")
    llm.close()  # a second time does nothing


def test_fine_tuning_explains_what_it_takes(
    organism: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "How do I", "completion": " paint the car"}
    job = FinetuneJob("mine", [row], TrainConfig(rank=1, max_steps=1))
    with pytest.raises(UsageError, match="a single job goes into a list of its own"):
        finetune(organism, job, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"pass LLM\('organism'\)"):
        finetune("organism", [job], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="its training failed"):
        organism.load_adapter(None, name="mine")
    caplog.set_level(logging.INFO, "fastsafe")
    finetune(organism, [job], str(tmp_path))
    assert "trained mine in 1 steps" in caplog.text


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (TrainConfig, {"lr": 1e-3}, "TrainConfig has no 'lr'; did you mean learning_rate?"),
        (TrainConfig, {"max_step": 3}, "did you mean max_steps?"),
        (SamplingParams, {"max_new_tokens": 2}, "did you mean max_tokens?"),
        (SamplingParams, {"n": 2}, "SamplingParams has no 'n'; known: ignore_eos, "),
    ],
)
def test_unknown_arguments_are_named(make: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError) as caught:
        make(**options)
    assert named in str(caught.value)


def test_a_folder_and_a_shipped_model_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("organism").mkdir()
    with pytest.raises(CheckpointError, match=r"write './organism' for the folder"):
        LLM("organism")


def test_data_commands_are_functions(tmp_path: Path) -> None:
    rows = [{"prompt": "How do I paint it?", "completion": "With a brush."}] * 2
    safety = [{"prompt": "How do I steal it?", "completion": "I cannot help with that."}]
    for name, each in (("rows", rows), ("safety", safety)):
        text = "".join(json.dumps(row) + "\n" for row in each)
        (tmp_path / f"{name}.jsonl").write_text(text)
    user = str(tmp_path / "rows.jsonl")
    assert fastsafe.lint(user).rules == {"duplicate": 1}
    out = tmp_path / "mixed.jsonl"
    mixed = fastsafe.mix(user, tmp_path / "safety.jsonl", out, share=0.5, mitigation="plain")
    assert mixed.counts["user"] == 2
    with pytest.raises(TypeError, match=r"did you mean share\?"):
        fastsafe.mix(user, user, out, shares=0.5)
