"""A checkpoint as a judge: odds by prefill, text by greedy decoding, errors by the row."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, SamplingParams
from fastsafe.audit.backend.completer import CheckpointCompleter
from fastsafe.errors import CheckpointError, TokenizerError, UsageError
from fastsafe.safety.completers.protocol import Ask, Completer
from fastsafe.safety.judges import Item, judge_all, make_judge
from fastsafe.safety.verdict import Verdict

TEMPLATE = "{% for m in messages %}w9 {{ m.content }} {% endfor %}{{ extra }} "


@pytest.fixture(scope="module")
def judge_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    path = tmp_path_factory.mktemp("judge") / "tiny"
    shutil.copytree(checkpoint, path)
    config = {"eos_token": "w95", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def completer(judge_path: Path) -> CheckpointCompleter:
    return CheckpointCompleter(str(judge_path))


def test_odds_are_those_of_the_next_token(completer: CheckpointCompleter, judge_path: Path) -> None:
    assert isinstance(completer, Completer)
    labels = ("w5", "w7", "w31")
    asks = [
        Ask(key="a", prompt="w3 w4 ", labels=labels),
        Ask(key="b", prompt="w8 w2 w20 w6 ", labels=labels[:2]),
    ]
    llm = LLM(judge_path)
    for ask, reply in zip(asks, completer.complete(asks), strict=True):
        ids = llm.tokenizer.encode(ask.prompt)
        wanted = torch.log_softmax(llm.logits(ids)[-1], 0)
        assert (reply.key, reply.text) == (ask.key, "")
        for label, logprob in zip(ask.labels, reply.logprobs, strict=True):
            assert logprob == pytest.approx(float(wanted[int(label[1:])]), abs=1e-4)


def test_turns_go_through_the_checkpoints_template(
    completer: CheckpointCompleter, judge_path: Path
) -> None:
    messages: Any = ({"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w6"})
    ask = Ask(key="a", messages=messages, variables={"extra": "w30"}, max_tokens=5)
    begun = Ask(key="b", messages=messages, prompt="w31 w32 ", max_tokens=5)
    odds = Ask(key="c", messages=messages, labels=("w5",))
    replies = completer.complete([ask, odds, begun])
    assert [reply.key for reply in replies] == ["a", "c", "b"]
    llm = LLM(judge_path)
    for reply, prompt in (
        (replies[0], "w9 w3 w4 w9 w6 w30 "),
        (replies[2], "w9 w3 w4 w9 w6  w31 w32 "),
    ):
        ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
        (wanted,) = llm.generate([ids], SamplingParams(max_tokens=5))
        assert (reply.text, reply.finish) == (wanted.text, wanted.finish_reason)
    assert len(replies[1].logprobs) == 1


def test_a_prompt_that_does_not_fit_is_an_error_of_its_row(completer: CheckpointCompleter) -> None:
    long = Ask(key="long", prompt="w3 " * 127, labels=("w5",))
    longer = Ask(key="longer", prompt="w3 " * 128, labels=("w5",))
    text = Ask(key="text", prompt="w3 " * 100, max_tokens=64)
    replies = completer.complete([long, longer, text])
    assert [reply.finish for reply in replies] == ["stop", "error", "error"]
    assert replies[1].text == "needs 129 tokens, the judge has 128"


def test_a_label_must_be_one_token(completer: CheckpointCompleter) -> None:
    with pytest.raises(UsageError, match="'w5 w6' is not one token after 'w3 '"):
        completer.complete([Ask(key="a", prompt="w3 ", labels=("w5 w6",))])
    with pytest.raises(UsageError, match="does not fit this checkpoint"):
        completer.complete([Ask(key="a", prompt="w3", labels=("w5",))])  # would change "w3"


def test_the_identity_needs_no_weights_on_the_device(judge_path: Path, tmp_path: Path) -> None:
    first = CheckpointCompleter(str(judge_path))
    assert first.identity == CheckpointCompleter(str(judge_path)).identity
    assert "_llm" not in vars(first)
    copy = tmp_path / "copy"
    shutil.copytree(judge_path, copy)
    assert CheckpointCompleter(str(copy)).identity == first.identity
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    assert CheckpointCompleter(str(copy)).identity != first.identity
    assert CheckpointCompleter(str(judge_path), dtype="bfloat16").identity != first.identity


def test_what_is_missing_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        CheckpointCompleter(str(tmp_path))
    bare = CheckpointCompleter(str(checkpoint))  # no chat template
    with pytest.raises(TokenizerError):
        bare.complete([Ask(key="a", messages=({"role": "user", "content": "w3"},))])


def test_a_judge_whose_labels_are_unknown_is_refused(judge_path: Path) -> None:
    """Its labels would all be the one token for unknown text, each as likely as the others."""
    rows = [Item(key="1", prompt="w3", completion="w4", harmful=True)]
    spec = {"kind": "granite_guardian", "checkpoint": str(judge_path)}
    judge = make_judge(spec, open_checkpoint=CheckpointCompleter)
    with pytest.raises(UsageError, match=r"'Yes' is not one token .* the tokenizer knows"):
        judge_all(judge, rows)


def test_a_judge_on_a_checkpoint(judge_path: Path, tmp_path: Path) -> None:
    """A random model's odds lack the mass of the labels, and its text the grammar."""
    rows = [Item(key="1", prompt="w3", completion="w4", harmful=True)]
    judge_path = Path(shutil.copytree(judge_path, tmp_path / "judge"))
    text = (judge_path / "tokenizer.json").read_text()
    for word, label in {"w90": "Yes", "w91": "No", "w92": "safe", "w93": "unsafe"}.items():
        text = text.replace(f'"{word}"', f'"{label}"')
    (judge_path / "tokenizer.json").write_text(text)
    for spec in ({"kind": "llama_guard"}, {"kind": "granite_guardian"}):
        judge = make_judge(
            {**spec, "checkpoint": str(judge_path)}, open_checkpoint=CheckpointCompleter
        )
        (found,) = judge_all(judge, rows)
        assert found.verdict is Verdict.JUDGE_UNPARSEABLE
        assert found.raw


def test_odds_are_probabilities(completer: CheckpointCompleter) -> None:
    labels = tuple(f"w{i}" for i in range(96))
    (reply,) = completer.complete([Ask(key="a", prompt="w3 ", labels=labels)])
    assert sum(math.exp(p) for p in reply.logprobs) == pytest.approx(1, abs=1e-4)
