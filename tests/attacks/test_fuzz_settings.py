"""Readers of settings, fuzzed: each accepts them or refuses them in one sentence.

``FUZZ_CASES`` sets the number of cases of all readers together, and ``FUZZ_SEED`` their seed; a
failure names both, and the fewest changes of a valid value that show it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fastsafe import SamplingParams, TrainConfig
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.panel import make_panel
from fastsafe.audit.recipe.load import load
from fastsafe.commands.train_settings import settle, train_config
from fastsafe.safety.judges import make_judge
from fastsafe.yaml_file import read_yaml
from fastsafe_testing import fuzzing
from fastsafe_testing.fuzz_files import value, yaml_file
from fastsafe_testing.fuzzing import YAML_RAW, Reader

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


def recipe(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Read a recipe up to the panel; checkpoints are opened for no judge."""
    checked = load(path, overrides=overrides)
    make_panel(checked, check_recipe(checked))


def override(given: Any) -> None:
    """Set each key; a value that is no mapping any more is the seed's."""
    for key, content in (given if isinstance(given, dict) else {"seed": given}).items():
        text = fuzzing.dumped(content, Random(0)).decode(errors="replace")
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


def judge(given: Any) -> None:
    """Make a judge of what a recipe's schema lets through."""
    if isinstance(given, str | dict):
        make_judge(given)


READERS = [
    Reader("recipe", [RECIPE], yaml_file("r.yaml", recipe), "", YAML_RAW, 150),
    Reader("yaml", [RECIPE], yaml_file("r.yaml", read_yaml), "r.yaml", YAML_RAW, 20),
    Reader("set", [{key: item} for key, item in SET.items()], value(override), "", YAML_RAW, 40),
    Reader(
        "train settings", [SETTINGS], yaml_file("t.yaml", settings_of_training), "", YAML_RAW, 40
    ),
    Reader("TrainConfig", [TRAINING], value(keywords(TrainConfig)), "", (), 20),
    Reader("SamplingParams", [SAMPLING], value(keywords(SamplingParams)), "SamplingParams", (), 20),
    Reader("judge", RECIPE["judges"], value(judge), "", (), 20),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers_accept_or_refuse_in_one_sentence(reader: Reader, tmp_path: Path) -> None:
    fuzzing.check(reader, tmp_path)
