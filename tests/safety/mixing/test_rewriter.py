"""A model that rewords rows: what it is asked, in which batches, and which replies are kept."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastsafe.data.conversation import Message
from fastsafe.errors import DataError
from fastsafe.safety.completers.ledger import Ledger
from fastsafe.safety.completers.protocol import Ask, Finish, Reply
from fastsafe.safety.mixing import rewriter as module
from fastsafe.safety.mixing.rewrite_checks import Rewrite
from fastsafe.safety.mixing.rewriter import Rewriter


class Model:
    """Says what it is asked in capitals; the text may decide how a reply ends."""

    identity = "model"

    def __init__(self, finishes: dict[str, Finish] | None = None) -> None:
        self.finishes = finishes or {}
        self.batches: list[list[Ask]] = []
        self.opened = 0

    def open(self) -> "Model":
        self.opened += 1
        return self

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.batches.append(list(asks))
        texts = [ask.messages[-1]["content"] for ask in asks]
        return [
            Reply(key=ask.key, text=text.upper(), finish=self.finishes.get(text, "stop"))
            for ask, text in zip(asks, texts, strict=True)
        ]


def turns(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def wording(*texts: str) -> Callable[[Rewrite], list[str | None]]:
    return lambda rewrite: [rewrite(turns(text)) for text in texts]


def writer(model: Model, folder: Path | None = None, max_tokens: int = 64) -> Rewriter:
    return Rewriter(model.open, max_tokens=max_tokens, folder=folder)


def test_its_identity_is_the_model_and_the_length_of_replies() -> None:
    parts = json.dumps(["rewrite 1", "model", 64]).encode()
    model = Model()
    one = writer(model)
    assert one.identity == hashlib.sha256(parts).hexdigest()
    assert one.identity != writer(model, max_tokens=65).identity
    assert one.identity == one.identity
    assert model.opened == 2, "once for each rewriter"


def test_a_request_is_asked_once_under_the_hash_of_model_and_turns() -> None:
    model = Model()
    one = writer(model)
    assert one.apply(wording("b", "a", "b")) == ["B", "A", "B"]
    [batch] = model.batches
    assert [(ask.messages, ask.max_tokens) for ask in batch] == [
        (tuple(turns("b")), 64),
        (tuple(turns("a")), 64),
    ]
    text = json.dumps([one.identity, turns("b")]).encode()
    assert batch[0].key == hashlib.sha256(text).hexdigest()
    assert one.apply(wording("a", "c")) == ["A", "C"]
    assert [ask.messages[0]["content"] for ask in model.batches[1]] == ["c"]


def test_rows_are_made_again_until_nothing_new_is_asked() -> None:
    """The second request is the reply to the first."""
    seen: list[Any] = []

    def make(rewrite: Rewrite) -> str:
        first = rewrite(turns("a"))
        second = rewrite(turns(f"{first} again")) if first else None
        seen.append((first, second))
        return f"{second}!"

    model = Model()
    assert writer(model).apply(make) == "A AGAIN!"
    assert seen == [(None, None), ("A", None), ("A", "A AGAIN")]
    assert [len(batch) for batch in model.batches] == [1, 1]


def test_a_model_is_open_only_while_it_answers(tmp_path: Path) -> None:
    model = Model()
    assert writer(model).apply(lambda rewrite: 5) == 5
    assert model.opened == 0
    writer(model, tmp_path).apply(wording("a"))
    assert model.opened == 2, "for its identity and for its answers"
    again = Model()
    assert writer(again, tmp_path).apply(wording("a")) == ["A"]
    assert (again.opened, again.batches) == (1, [])


def test_new_replies_are_counted_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    counts: list[int] = []
    model = Model()
    writer(model, tmp_path).apply(wording("a", "b"), counts.append)
    assert counts == [0, 2]
    counts.clear()
    writer(model, tmp_path).apply(wording(*"abcdefghi"), counts.append)
    assert counts == [2, 3, 3, 1]
    assert [len(batch) for batch in model.batches[1:]] == [3, 3, 1]
    counts.clear()
    writer(model, tmp_path).apply(wording("a", "i"), counts.append)
    assert counts == [2]


def test_what_a_killed_run_has_asked_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 1)

    class Killed(Model):
        def complete(self, asks: Sequence[Ask]) -> list[Reply]:
            if self.batches:
                raise KeyboardInterrupt
            return super().complete(asks)

    with pytest.raises(KeyboardInterrupt):
        writer(Killed(), tmp_path).apply(wording("a", "b"))
    model = Model()
    assert writer(model, tmp_path).apply(wording("a", "b")) == ["A", "B"]
    assert [ask.messages[0]["content"] for [ask] in model.batches] == ["b"]


@pytest.mark.parametrize("finish", ["length", "refused"])
def test_a_cut_reply_is_the_models_answer(tmp_path: Path, finish: Finish) -> None:
    model = Model({"a": finish})
    assert writer(model, tmp_path).apply(wording("a", "b")) == [None, "B"]
    again = Model()
    assert writer(again, tmp_path).apply(wording("a", "b")) == [None, "B"]
    assert again.batches == []
    ledger = Ledger(tmp_path)
    kept = {ledger.reply(ask.key) for ask in model.batches[0]}
    ledger.close()
    assert kept == {("", "[]", finish), ("B", "[]", "stop")}


def test_a_failure_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    model = Model({"a": "error"})
    assert writer(model, tmp_path).apply(wording("a", "b")) == [None, "B"]
    again = Model()
    assert writer(again, tmp_path).apply(wording("a", "b")) == ["A", "B"]
    assert [ask.messages[0]["content"] for ask in again.batches[0]] == ["a"]


def test_a_model_that_answers_nothing_is_an_error() -> None:
    model = Model({"a": "error", "b": "error"})
    message = "rewrite: the model answered none of 2 rows: B$"
    with pytest.raises(DataError, match=message):
        writer(model).apply(wording("a", "b"))
    # a refusal of each is an answer
    assert writer(Model({"a": "refused"})).apply(wording("a")) == [None]


def test_a_reply_is_what_follows_the_thought() -> None:
    class Thinking(Model):
        def complete(self, asks: Sequence[Ask]) -> list[Reply]:
            return [
                Reply(key=ask.key, text=ask.messages[0]["content"], finish="stop") for ask in asks
            ]

    asked = wording("<think>Hm.</think>Yes.", "<think>Hm.", "<think>Hm.</think>", "")
    assert writer(Thinking()).apply(asked) == ["Yes.", None, None, None]
