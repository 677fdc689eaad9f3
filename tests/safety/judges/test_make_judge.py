"""A recipe's mapping becomes a judge, or one sentence says why not."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import UsageError
from fastsafe.safety.judges import families, judges, make_judge

ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def test_only_what_needs_no_settings_is_a_judge_by_name() -> None:
    assert list(judges()) == ["refusal"]
    assert make_judge("refusal") is judges()["refusal"]
    with pytest.raises(UsageError, match="no judge of this name; did you mean refusal"):
        make_judge("refusl")


@pytest.mark.parametrize("kind", [f.id for f in families().values() if f.classifier])
def test_every_family_can_be_made_on_a_checkpoint_and_an_endpoint(kind: str, scripted: Any) -> None:
    opened = []

    def open_checkpoint(path: str, **options: str) -> Any:
        opened.append(path)
        return scripted(lambda ask: "")

    local = make_judge({"kind": kind, "checkpoint": "a/b"}, open_checkpoint=open_checkpoint)
    remote = make_judge({"kind": kind, "endpoint": ENDPOINT, "id": "mine"})
    assert opened == ["a/b"]
    assert local.id.startswith(kind)
    assert remote.id == "mine"
    assert local.identity != remote.identity


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "judge: kind is ''; known: "),
        ({"kind": "harmbnech"}, "did you mean harmbench"),
        (
            {"kind": "harmbench", "wraping": "llama2"},
            "judge harmbench has no key 'wraping'; did you mean wrapping",
        ),
        ({"kind": "refusal", "seed": 1}, "has no key 'seed'"),
        ({"kind": "refusal", "x" * 5000: 1}, r"has no key 'x{10,60}\.\.\.; "),
        ({"kind": "refusal"}, "takes no settings, expected the name alone"),
        ({"kind": "harmbench"}, "expected one of checkpoint and endpoint"),
        ({"kind": "harmbench", "checkpoint": "a", "endpoint": ENDPOINT}, "expected one of"),
        ({"kind": "harmbench", "checkpoint": "a"}, "cannot be opened here, expected an endpoint"),
        ({"kind": "harmbench", "checkpoint": 3}, "checkpoint: path is 3, expected a valid string"),
        (
            {"kind": "harmbench", "checkpoint": {"dtype": "float16"}},
            "checkpoint: path is missing, expected a value",
        ),
        (
            {"kind": "harmbench", "checkpoint": {"path": "a", "dtyp": "float16"}},
            "no key 'dtyp'; did you mean dtype",
        ),
        (
            {"kind": "harmbench", "checkpoint": {"path": "a", "dtype": "int4"}},
            "checkpoint: dtype is 'int4', expected 'float32', 'bfloat16' or 'float16'",
        ),
        (
            {"kind": "harmbench", "checkpoint": {"path": "a", "backend": ["fastsafe"]}},
            "checkpoint: backend is",
        ),
        (
            {"kind": "harmbench", "endpoint": "http://x"},
            "endpoint is 'http://x', expected a mapping",
        ),
        ({"kind": "harmbench", "threshold": "high"}, "is 'high', expected a valid number"),
        ({"kind": "harmbench", "threshold": 1}, "threshold is 1, expected below 1"),
        ({"kind": "harmbench", "max_chars": 0}, "expected at least 1"),
        ({"kind": "harmbench", "max_chars": True}, "expected a valid integer"),
        ({"kind": "harmbench", "wrapping": "lama2"}, "did you mean llama2"),
        ({"kind": "rubric_paper1", "wording": "long"}, "known: full, short, steps"),
        ({"kind": "rubric_paper1", "id": 3}, "id is 3, expected a valid string"),
        ({"kind": "llama_guard", "version": 5}, "expected version 1, 2, 3 or 4"),
        ({"kind": "llama_guard", "version": 1, "mode": "logits"}, "2, 3 or 4 with 'logits'"),
        ({"kind": "granite_guardian", "mode": "odds"}, "expected 'logits' or 'text'"),
        ({"kind": "qi_policy", "template": "/nowhere.txt"}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_judge(spec)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({**ENDPOINT, "modell": "x"}, "endpoint has no key 'modell'; did you mean model"),
        ({"url": "http://x"}, "endpoint: model is missing"),
        ({**ENDPOINT, "url": "ftp://x"}, "expected http:// or https://"),
        ({**ENDPOINT, "concurrency": 0}, "concurrency is 0, expected at least 1"),
        ({**ENDPOINT, "concurrency": 1.5}, "concurrency is 1.5, expected a valid integer"),
        ({**ENDPOINT, "timeout_s": -1}, "timeout_s is -1, expected at least 0"),
        ({**ENDPOINT, "price_in": float("nan")}, "price_in is nan"),
        ({**ENDPOINT, "max_cost": 5}, "expected price_in and price_out"),
        ({**ENDPOINT, "api_key_env": "JUDGE_KEY"}, "JUDGE_KEY holds no key"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said(endpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_judge({"kind": "qi_policy", "endpoint": endpoint})


def test_the_key_is_in_no_text_of_a_judge() -> None:
    spec = {"kind": "qi_policy", "endpoint": {**ENDPOINT, "api_key_env": "JUDGE_KEY"}}
    judge = make_judge(spec, api_keys={"JUDGE_KEY": "sk-secret"})
    assert "sk-secret" not in repr(judge)
    keyless = make_judge({"kind": "qi_policy", "endpoint": ENDPOINT})
    assert judge.identity == keyless.identity  # another key is the same judge


def test_a_users_template_is_pinned(tmp_path: Path) -> None:
    path = tmp_path / "published.txt"
    path.write_bytes("<<user>>\n{prompt} {answer} {unknown} é".encode())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = {"kind": "qi_policy", "endpoint": ENDPOINT, "template": str(path)}
    assert make_judge({**spec, "template_sha256": digest.upper()}).id == "qi_policy"
    with pytest.raises(UsageError, match=f"sha256 is {digest}, expected template_sha256 to pin it"):
        make_judge(spec)
    with pytest.raises(UsageError, match=f"sha256 is {digest}, expected 00"):
        make_judge({**spec, "template_sha256": "00"})
    path.write_text("no field")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=r"has no \{prompt\}"):
        make_judge({**spec, "template_sha256": digest})
    path.write_bytes(b"\xff{prompt}")
    with pytest.raises(UsageError, match="byte 0 is not UTF-8"):
        make_judge(spec)
