"""What is asked of a model, what is written of its answers, and what is never asked twice."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.commands import generate as module
from fastsafe.commands.generate import (
    CompletionStream,
    CompletionTexts,
    complete,
    identity_of,
    open_completions,
)
from fastsafe.commands.prompt_rows import PromptFile
from fastsafe.engine import Completion, SamplingParams
from fastsafe.errors import DataError, StoreError, TokenizerError
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress


class Tokenizer:
    """Tokens are characters; a conversation is the text of its messages."""

    def encode(self, text: str) -> list[int]:
        if "!" in text:
            raise TokenizerError("has a character without a token")
        return [ord(c) for c in text.strip()]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        assert isinstance(messages, list)
        return self.encode("/".join(m["content"] for m in messages))


class Model:
    """Answers the last prompt of a call first."""

    def __init__(self, context: int | None = 10, logprobs: tuple[float, ...] | None = None) -> None:
        config = SimpleNamespace(max_position_embeddings=context)
        self.model = SimpleNamespace(config=config if context else object())
        self.tokenizer = Tokenizer()
        self.logprobs = logprobs
        self.calls: list[list[tuple[str, int, str | None]]] = []

    def generate(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        adapters: list[str | None],
        on_result: Callable[[int, Completion], None],
    ) -> None:
        texts = ["".join(map(chr, ids)) for ids in prompts]
        seeds = [p.seed for p in params]
        self.calls.append(list(zip(texts, seeds, adapters, strict=True)))
        for index in reversed(range(len(prompts))):
            reason: Any = "error" if texts[index] == "fails" else "stop"
            completion = Completion(
                text=f"<{texts[index]}>",
                token_ids=(1, 2) if reason == "stop" else (),
                logprobs=self.logprobs,
                finish_reason=reason,
                num_prompt_tokens=len(prompts[index]),
            )
            on_result(index, completion)


class Counted(Progress):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.calls.append((stage, total, unit))

    def advance(self, count: int, note: str = "") -> None:
        self.calls.append(count)


class Kept:
    """Completions in memory."""

    def __init__(self, done: dict[str, dict[str | None, str]] | None = None) -> None:
        self.name, self.done, self.rows = "out.jsonl", done or {}, list[dict[str, Any]]()

    def add(self, row: Any) -> None:
        self.rows.append(dict(row))


ROWS: list[dict[str, Any]] = [
    {"prompt": "red car"},
    {"messages": [{"role": "user", "content": "boat"}], "id": "chat"},
    {"prompt": "fails", "id": 7, "adapter": "x"},
]


def prompts(tmp_path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> PromptFile:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptFile(path, ("x", "y"))


def seed_of(seed: int, row_id: str) -> int:
    """As the documentation of a run has it: 63 bits of the hash of the seed and the id."""
    return int(hashlib.sha256(f"{seed} {row_id}".encode()).digest()[:8][::-1].hex(), 16) // 2


def test_rows_are_written_as_they_finish(tmp_path: Path) -> None:
    asked, kept, model, progress = prompts(tmp_path), Kept(), Model(), Counted()
    began = time.monotonic()
    summary = complete(model, asked, kept, SamplingParams(seed=3), progress=progress)
    took = time.monotonic() - began
    assert model.calls == [
        [
            ("red car", seed_of(3, "1"), None),
            ("boat", seed_of(3, "chat"), None),
            ("fails", seed_of(3, "7"), "x"),
        ]
    ]
    first, second, third = (row.sha256 for row in asked)
    assert kept.rows == [
        {
            "id": "7",
            "adapter": "x",
            "prompt_sha256": third,
            "text": "<fails>",
            "token_ids": [],
            "finish_reason": "error",
        },
        {
            "id": "chat",
            "adapter": None,
            "prompt_sha256": second,
            "text": "<boat>",
            "token_ids": [1, 2],
            "finish_reason": "stop",
        },
        {
            "id": "1",
            "adapter": None,
            "prompt_sha256": first,
            "text": "<red car>",
            "token_ids": [1, 2],
            "finish_reason": "stop",
        },
    ]
    assert (summary.rows, summary.skipped, summary.errors, summary.tokens) == (3, 0, 1, 4)
    assert 0 < summary.seconds <= took
    assert progress.calls == [("generate", 3, "prompts"), 1, 1, 1]


def test_prompts_and_log_probabilities_are_written_on_demand(tmp_path: Path) -> None:
    kept = Kept()
    model = Model(logprobs=(-0.5, -0.25))
    complete(model, prompts(tmp_path), kept, SamplingParams(), with_prompts=True)
    assert [row["logprobs"] for row in kept.rows] == [[-0.5, -0.25]] * 3
    assert [(row.get("prompt"), row.get("messages")) for row in kept.rows] == [
        ("fails", None),
        (None, ROWS[1]["messages"]),
        ("red car", None),
    ]
    # the order of keys is that of the documentation, whatever is left out
    assert list(kept.rows[0]) == [
        *("id", "adapter", "prompt_sha256", "prompt"),
        *("text", "token_ids", "finish_reason", "logprobs"),
    ]


def test_what_has_a_completion_is_not_asked(tmp_path: Path) -> None:
    asked = prompts(tmp_path)
    first, _, third = asked
    kept = Kept({"1": {None: first.sha256}, "7": {"x": third.sha256}, "other": {None: "0"}})
    model, progress = Model(), Counted()
    summary = complete(model, asked, kept, SamplingParams(), progress=progress)
    assert [[text for text, _, _ in call] for call in model.calls] == [["boat"]]
    assert (summary.rows, summary.skipped) == (1, 2)
    assert sorted(map(str, progress.calls[1:])) == ["1", "1", "1"]
    assert model.calls[0][0][1] == seed_of(0, "chat")


@pytest.mark.parametrize("done", [{None: "another"}, {"y": "another"}])
def test_an_id_that_has_another_completion_is_refused(
    tmp_path: Path, done: dict[str | None, str]
) -> None:
    message = (
        r"p\.jsonl: line 2: id 'chat' has a completion of another prompt in out\.jsonl,"
        " expected the same one; use new ids or another --out"
    )
    with pytest.raises(DataError, match=message):
        complete(Model(), prompts(tmp_path), Kept({"chat": done}), SamplingParams())


def test_a_prompt_for_every_adapter_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = prompts(tmp_path, [{"prompt": "a"}, {"prompt": "b", "adapter": "y"}])
    asked.cross()
    base, x, *_ = asked
    kept, model = Kept({"1": {None: base.sha256, "x": x.sha256}}), Model()
    assert complete(model, asked, kept, SamplingParams()).skipped == 2
    assert [(text, adapter) for text, _, adapter in model.calls[0]] == [("a", "y"), ("b", "y")]
    wrong = Kept({"1": {None: base.sha256, "x": "another"}})
    with pytest.raises(DataError, match="line 1: id '1' has a completion of another prompt"):
        complete(model, asked, wrong, SamplingParams())


def test_windows_and_the_question_whether_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", 2)
    asked, model = prompts(tmp_path, [{"prompt": f"{i}"} for i in range(5)]), Model()
    answers = iter([False, False, False])
    complete(model, asked, Kept(), SamplingParams(), is_stopping=lambda: next(answers))
    assert [[text for text, _, _ in call] for call in model.calls] == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
    ]
    assert next(answers, "asked before each window") == "asked before each window"


@pytest.mark.parametrize("kind", ["prompt", "messages"])
@pytest.mark.parametrize(
    ("text", "context", "named"),
    [
        ("123456789", 10, None),
        ("1234567890", 10, "the prompt is 10 tokens, expected 1 to 9, which leaves room for a"),
        ("12345678901", 10, "the prompt is 11 tokens, expected 1 to 9"),
        (" ", 10, "the prompt is 0 tokens, expected 1 to 9"),
        (" ", None, "the prompt is 0 tokens, expected 1 to any number"),
        ("1" * 5000, None, None),
        ("!", 10, "has a character without a token"),
    ],
)
def test_a_prompt_leaves_room_for_an_answer(
    tmp_path: Path, kind: str, text: str, context: int | None, named: str | None
) -> None:
    turns = [{"role": "user", "content": text}]
    asked = prompts(tmp_path, [{"prompt": "a"}, {kind: text if kind == "prompt" else turns}])
    model, kept = Model(context), Kept()
    if named is None:
        complete(model, asked, kept, SamplingParams())
        assert kept.rows[0]["text"] == f"<{text}>"
    else:
        with pytest.raises(DataError) as caught:
            complete(model, asked, kept, SamplingParams())
        assert str(caught.value).startswith(f"{asked.name}: line 2: {named}")
        assert not model.calls


def test_a_stream_has_a_line_per_completion() -> None:
    lines: list[bytes] = []
    stream = CompletionStream("stdout", lines.append)
    stream.add({"id": "1", "text": "é\n\ud800"})
    stream.add({"id": "2"})
    assert (stream.name, stream.done) == ("stdout", {})
    assert lines == ['{"id": "1", "text": "é\\n\\ud800"}\n'.encode(), b'{"id": "2"}\n']


def test_texts_are_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    written: list[str] = []
    texts = CompletionTexts(prompts(tmp_path), written.append)
    assert (texts.name, texts.done) == ("stdout", {})
    texts.add({"id": "chat", "adapter": None, "text": "two"})
    assert written == []
    texts.add({"id": "1", "adapter": None, "text": "one"})
    assert written == ["# 1, base\none\n", "# chat, base\ntwo\n"]
    texts.add({"id": "7", "adapter": "x", "text": "three"})
    assert written[2:] == ["# 7, x\nthree\n"]


def test_the_text_of_a_single_prompt_stands_alone(tmp_path: Path) -> None:
    written: list[str] = []
    texts = CompletionTexts(prompts(tmp_path, ROWS[:1]), written.append)
    texts.add({"id": "1", "adapter": None, "text": "one"})
    assert written == ["one"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file with one completion, of settings that hold a tuple."""
    with open_completions(tmp_path / "out", {"stop": ("a",), "n": 1}, {"os": "x"}) as completions:
        assert completions.name == str(tmp_path / "out")
        completions.add({"id": "1", "adapter": None, "prompt_sha256": "s"})
    return tmp_path / "out"


def test_a_file_is_begun_and_gone_on_with(out: Path) -> None:
    manifest = json.loads(out.with_name("out.manifest.json").read_text())
    assert manifest == {
        "schema": "fastsafe.completions/1",
        "identity": {"stop": ["a"], "n": 1},
        "environment": {"os": "x"},
    }
    with open_completions(out, {"stop": ("a",), "n": 1}, {"os": "y"}) as completions:
        assert completions.done == {"1": {None: "s"}}
        completions.add({"id": "1", "adapter": "x", "prompt_sha256": "t"})
        completions.add({"id": "2", "adapter": None, "prompt_sha256": "u"})
    with open_completions(out, {"stop": ["a"], "n": 1}, {}) as completions:
        assert completions.done == {"1": {None: "s", "x": "t"}, "2": {None: "u"}}
    assert len(out.read_bytes().splitlines()) == 3


def test_other_settings_are_named(out: Path) -> None:
    message = r"out: was begun with other settings \(m: null -> 0; n: 1 -> 2; stop: .*\), expected"
    with pytest.raises(StoreError, match=message), open_completions(out, {"n": 2, "m": 0}, {}):
        pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{}", "has no identity, expected one; use another --out"),
        ('{"identity": [1]}', "has no identity, expected one"),
        ("[1]", "; use another --out"),
        (f'{{"a": "{"x" * (1 << 20)}"}}', "; use another --out"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(out: Path, content: str, named: str) -> None:
    manifest = out.with_name("out.manifest.json")
    manifest.write_text(content)
    with pytest.raises(StoreError) as caught, open_completions(out, {}, {}):
        pass
    assert str(manifest) in str(caught.value)
    assert str(caught.value).endswith(named) or named in str(caught.value)


def test_a_file_without_its_manifest_is_refused(out: Path) -> None:
    out.with_name("out.manifest.json").unlink()
    message = r"out: exists without out\.manifest\.json, expected a new file or one that fastsafe"
    with pytest.raises(StoreError, match=message), open_completions(out, {}, {}):
        pass


@pytest.mark.parametrize("last", [b'{"id": "2"', b'{"id": "2"}\n', b"[1]\n", b"null\n", b"\xff\n"])
def test_a_last_line_that_was_not_finished_is_cut_off(out: Path, last: bytes) -> None:
    whole = out.read_bytes()
    identity = {"stop": ["a"], "n": 1}
    out.write_bytes(whole + last)
    with open_completions(out, identity, {}) as completions:
        assert completions.done == {"1": {None: "s"}}
        assert out.read_bytes() == whole
    out.write_bytes(whole + b'{"id": "2"}\n' + whole)
    with (
        pytest.raises(StoreError, match="out: line 2 is not a completion, expected only the last"),
        open_completions(out, identity, {}),
    ):
        pass


def test_identity_is_everything_that_decides_completions(tmp_path: Path) -> None:
    weights = tmp_path / "a"
    weights.mkdir()
    (weights / "adapter_config.json").write_text("{}")
    (weights / "adapter_model.safetensors").write_bytes(b"weights")
    llm = SimpleNamespace(describe=lambda: {"adapters": "mixed", "device": "cpu"})
    runtime = cast(EngineBackend, SimpleNamespace(engine={"checkpoint_sha256": "c"}, llm=llm))
    params = SamplingParams(max_tokens=5, stop="end")
    found = identity_of(runtime, {"x": weights}, params, strict=True)
    assert found == {
        "checkpoint_sha256": "c",
        "adapters": {"x": weights_sha256(weights)},
        "applied": "mixed",
        "strict": True,
        "sampling": {**vars(params), "stop": ("end",)},
    }
    assert identity_of(runtime, {}, params, strict=False)["strict"] is False
