"""The generate stage: what is asked together, with which adapters, and what is stored when."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.protocol import Answer, OnAnswer, Request
from fastsafe.audit.stages import generate
from fastsafe.audit.store.rows import CompletionRow, PlannedRow
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.progress import Progress

# (condition, its adapter) in the order of the plan; the second serves the weights of the first
ADAPTERS = {"base": None, "a": "a", "served": "a", "plain": None, "b": "b"}
EACH = 5  # rows of every condition


class Backend:
    """Answers every request but those above a limit, then fails."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.calls: list[tuple[list[Request], dict[str, Path], Any]] = []

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Any,
        on_answer: OnAnswer,
    ) -> None:
        self.calls.append((list(requests), dict(adapters), sampling))
        # as in the engine, the short ones are finished first
        for index in reversed(range(len(requests))):
            if not self.limit:
                raise RuntimeError("the device is lost")
            self.limit -= 1
            seed = requests[index].seed
            on_answer(index, Answer(f"text {seed}", [seed] * 3, "stop"))


class Counted(Progress):
    def __init__(self) -> None:
        self.begun: list[tuple[str, int, str]] = []
        self.counts: list[int] = []

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.begun.append((stage, total, unit))

    def advance(self, count: int, note: str = "") -> None:
        self.counts.append(count)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / NAME, create=True)
    rows = [
        PlannedRow(f"{name} {i}", name, "harmful", "plain", "none", str(i), 0, 100 * n + i, "p", 9)
        for n, name in enumerate(ADAPTERS)
        for i in range(EACH)
    ]
    with store.transaction():
        store.add_plan(rows, {"p": ("steal it", [1, 2, 3])})
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "COMMIT_EVERY_S", float("inf"))


def run(store: Store, backend: Backend, wave_size: int = 2) -> Counted:
    conditions = [SimpleNamespace(id=name, adapter=adapter) for name, adapter in ADAPTERS.items()]
    recipe = SimpleNamespace(sampling="how", wave_size=wave_size)
    plan: Any = SimpleNamespace(conditions=conditions, recipe=recipe)
    progress, engine = Counted(), cast(EngineBackend, backend)
    generate.generate(plan, store, engine, store.path.parent, progress)
    return progress


def add(store: Store, keys: Sequence[str]) -> None:
    with store.transaction():
        store.add_completions([CompletionRow(key, "old", [1], "stop") for key in keys])


def texts(store: Store) -> dict[str, str]:
    return dict(store._all("SELECT key, text FROM completions"))


def seeds(backend: Backend) -> list[list[int]]:
    return [[request.seed for request in requests] for requests, _, _ in backend.calls]


def test_a_wave_is_asked_together_with_its_adapters_alone(store: Store) -> None:
    backend = Backend()
    run(store, backend)
    folder = store.path.parent / "adapters"
    loaded = [adapters for _, adapters, _ in backend.calls]
    assert loaded == [{"a": folder / "a"}, {"b": folder / "b"}]
    # of four models two are a wave; the base goes with the first
    first = [100 * n + i for n in range(3) for i in range(EACH)]
    second = [100 * n + i for n in range(3, 5) for i in range(EACH)]
    assert seeds(backend) == [first, second]
    requests, _, sampling = backend.calls[0]
    assert sampling == "how"
    assert [request.adapter for request in requests] == [None] * 5 + ["a"] * 10
    assert {request.token_ids for request in requests} == {(1, 2, 3)}
    assert {request.max_tokens for request in requests} == {9}


def test_a_wave_whose_models_have_no_adapter_loads_none(store: Store) -> None:
    backend = Backend()
    run(store, backend, wave_size=1)
    loaded = [set(adapters) for _, adapters, _ in backend.calls]
    assert loaded == [{"a"}, {"a"}, set(), {"b"}]
    assert [len(asked) for asked in seeds(backend)] == [10, 5, 5, 5]


def test_every_answer_is_stored_under_its_key(store: Store) -> None:
    run(store, Backend())
    rows = store._all("SELECT key, text, finish_reason FROM completions")
    planned = store._all("SELECT key, seed FROM planned")
    assert sorted(rows) == sorted((key, f"text {seed}", "stop") for key, seed in planned)
    tokens = {key: bytes(ids) for key, ids in store._all("SELECT key, token_ids FROM completions")}
    assert tokens["a 1"] == b"e\0\0\0" * 3  # 101, as it was answered


@pytest.mark.parametrize("size", [1, 7, 15, 16])
def test_a_chunk_has_at_most_so_many_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(generate, "CHUNK_ROWS", size)
    backend = Backend()
    run(store, backend)
    sizes = [min(size, wave - at) for wave in (15, 10) for at in range(0, wave, size)]
    assert [len(asked) for asked in seeds(backend)] == sizes


def test_an_unfinished_chunk_is_asked_again_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CHUNK_ROWS", 5)
    add(store, [f"base {i}" for i in range(EACH)] + ["a 1", "b 4"])
    backend = Backend()
    progress = run(store, backend)
    chunks = [[100 * n + i for i in range(EACH)] for n in range(1, 5)]
    assert seeds(backend) == chunks
    assert {key for key, text in texts(store).items() if text == "old"} == {
        *(f"base {i}" for i in range(EACH)),
        *("a 1", "b 4"),
    }
    # what was there counts once, at the beginning
    assert progress.begun == [("generate", 25, "answers")]
    assert progress.counts == [7, 4, 5, 5, 4]


def test_a_run_that_is_done_asks_for_nothing(store: Store) -> None:
    run(store, Backend())
    again = Backend()
    progress = run(store, again)
    assert again.calls == []
    assert progress.counts == [25]
    assert len(store.events("generate")) == 2


def test_an_event_counts_what_was_asked(store: Store) -> None:
    began = time.monotonic()
    run(store, Backend())
    events = store.events("generate")
    assert [event["rows"] for event in events] == [15, 10]
    assert [event["prompt_tokens"] for event in events] == [45, 30]
    assert [event["completion_tokens"] for event in events] == [45, 30]
    assert 0 <= sum(event["duration_s"] for event in events) <= time.monotonic() - began


def test_answers_outlive_an_engine_that_fails(store: Store) -> None:
    backend = Backend(limit=4)
    with pytest.raises(RuntimeError, match="the device is lost"):
        run(store, backend)
    assert set(texts(store)) == {f"served {i}" for i in range(1, 5)}
    assert store.events("generate") == []
    progress = run(store, Backend())
    assert progress.counts == [4, 11, 10]
    assert len(texts(store)) == 25


@pytest.mark.parametrize("rows", [1, 4, 5, 15])
def test_a_commit_holds_so_many_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(generate, "COMMIT_ROWS", rows)
    progress = run(store, Backend())
    commits = [min(rows, wave - at) for wave in (15, 10) for at in range(0, wave, rows)]
    assert progress.counts == [0, *commits]


def test_a_late_answer_is_stored_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer takes half of the time between two commits."""
    now = math.ceil(time.monotonic())  # the writer's first look is at the real clock

    class Slow(Backend):
        def generate(self, requests: Any, adapters: Any, sampling: Any, on_answer: Any) -> None:
            def late(index: int, answer: Answer) -> None:
                nonlocal now
                now += 2
                on_answer(index, answer)

            super().generate(requests, adapters, sampling, late)

    monkeypatch.setattr(generate, "COMMIT_EVERY_S", 4)
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=lambda: now))
    progress = run(store, Slow())
    # the second writer began, by the real clock, long before its first answer
    assert progress.counts == [0, *[2] * 7, 1, 1, *[2] * 4, 1]
    assert [event["duration_s"] for event in store.events("generate")] == [30, 20]
