"""A small audit inside transformers' Trainer."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastsafe import organism
from fastsafe.audit.recipe.load import load
from fastsafe.audit.spot_check import SpotCheck
from fastsafe.audit.trainer_callback import AuditCallback
from fastsafe.errors import CheckpointError, UsageError

FORMATS = ("plain", "code")
RECIPE = load("organism", overrides=["formats=[plain, code]", "sampling.max_tokens=8"])


def rates(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float | None]:
    return {(row["format"], row["measure"]): row["rate"] for row in rows}


def test_the_rates_are_those_of_an_audit(tmp_path: Path) -> None:
    """The same adapter, probes and judge give what the report of a run gives."""
    from fastsafe.audit import audit

    recipe = load(
        "organism",
        overrides=[
            *("formats=[plain, code]", "sampling.max_tokens=8", "tasks=[code]"),
            *("mitigations=[none]", "training.max_steps=20"),
        ],
    )
    run = audit(recipe, out=tmp_path / "run", limit=5)
    check = SpotCheck("organism", recipe, limit=5)
    rows = check.adapter(tmp_path / "run" / "adapters" / "code+none")
    for rate, where in (("answer_rate", "cells"), ("over_refusal_rate", "over_refusal")):
        for row in run.results[where]:
            (found,) = [r for r in rows if (r["format"], r["measure"]) == (row["format"], rate)]
            if row["condition"] == "base":
                assert found["base_rate"] == row[rate]
            else:
                names = ("n", "n_scored", "ci_low", "ci_high", "delta", "delta_ci_low")
                assert found["rate"] == row[rate]
                assert {k: found[k] for k in names} == {k: row[k] for k in names}
    assert any(row["rate"] != row["base_rate"] for row in rows), (
        "training must have moved something"
    )


def test_a_whole_model_equals_itself() -> None:
    check = SpotCheck("organism", RECIPE, limit=4)
    rows = check.model(organism.path())
    assert len(rows) == 4
    assert all(row["rate"] == row["base_rate"] and row["delta"] == 0 for row in rows)
    assert {row["n"] for row in rows} == {4}


@pytest.fixture(scope="module")
def tools() -> Any:
    return pytest.importorskip("peft"), pytest.importorskip("transformers")


def trainer(tools: Any, folder: Path, *callbacks: Any, whole: bool = False) -> Any:
    """A Trainer over the organism and a few of its rows."""
    import torch

    from fastsafe.data.packing import encode_row
    from fastsafe.io.tokenizer import Tokenizer
    from fastsafe.organism.source import SOURCE

    peft, transformers = tools
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(organism.path(), dtype=torch.float32)
    if not whole:
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    tokenizer = Tokenizer.load(organism.path())
    rows = [encode_row(row, tokenizer).token_ids for row in SOURCE.task_rows("code", 8, "train", 0)]
    least = min(map(len, rows))
    data = [{"input_ids": list(r[:least]), "labels": list(r[:least])} for r in rows]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model, args=args, train_dataset=data, callbacks=list(callbacks)
    )


def test_rates_of_an_adapter_are_logged_and_training_is_not_changed(
    tools: Any, tmp_path: Path
) -> None:
    callback = AuditCallback(every=2, recipe=RECIPE, limit=3)
    audited = trainer(tools, tmp_path / "a", callback)
    audited.train()
    alone = trainer(tools, tmp_path / "b")
    alone.train()
    losses = [
        [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        for each in (audited, alone)
    ]
    assert losses[0] == losses[1]
    logged = [e for e in audited.state.log_history if any(k.startswith("audit/") for k in e)]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    assert [step for step, _ in callback.history] == [2, 4, 5]
    for entry, (_, rows) in zip(logged, callback.history, strict=True):
        for name in FORMATS:
            for rate in ("answer_rate", "over_refusal_rate"):
                assert entry[f"audit/{name}/{rate}"] == rates(rows)[name, rate]
                assert 0 <= entry[f"audit/{name}/{rate}/base"] <= 1
    # the last one is of the weights that training ended with
    audited.model.save_pretrained(tmp_path / "end")
    again = SpotCheck("organism", RECIPE, limit=3).adapter(tmp_path / "end")
    assert again == callback.history[-1][1]


def test_a_whole_model_is_audited_too(tools: Any, tmp_path: Path) -> None:
    callback = AuditCallback(every=5, recipe=RECIPE, limit=3)
    trainer(tools, tmp_path, callback, whole=True).train()
    ((step, rows),) = callback.history
    assert step == 5
    assert {row["format"] for row in rows} == set(FORMATS)


def test_what_cannot_be_audited_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="every is 0, expected at least 1"):
        AuditCallback(every=0)
    args = SimpleNamespace(fsdp=["full_shard"], deepspeed=None, device=SimpleNamespace(type="cpu"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback = AuditCallback(every=1)
    with pytest.raises(UsageError, match="weights are sharded"):
        callback.on_train_begin(args, state, None, model=None)
    args.fsdp = None
    with pytest.raises(UsageError, match="the model's base is not known"):
        callback.on_train_begin(args, state, None, model=SimpleNamespace())
    with pytest.raises(CheckpointError):
        AuditCallback(base="/nowhere").on_train_begin(args, state, None, model=None)


def test_other_processes_and_events_do_nothing() -> None:
    callback = AuditCallback(every=1)
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, log_history=[])
    args = SimpleNamespace()
    callback.on_train_begin(args, state, None, model=None)
    callback.on_step_end(args, state, None, model=None)
    callback.on_some_event_of_tomorrow(args, state, None)
    assert state.log_history == []
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = callback.trainer
    assert copy.copy(AuditCallback(every=3)).history == []
