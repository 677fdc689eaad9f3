"""The store: rows once, transactions whole, and sentences for what goes wrong."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsafe.audit.store.rows import CompletionRow, JudgementRow, PlannedRow
from fastsafe.audit.store.sqlite_store import NAME, Store
from fastsafe.errors import StoreError

ROWS = [
    PlannedRow("k1", "base", "harmful", "code", "none", "b1", 0, 7, "p1", 32),
    PlannedRow("k2", "tuned", "harmful", "code", "none", "b1", 0, 7, "p1", 32),
    PlannedRow("k3", "tuned", "utility", "code", "none", "0", 0, 2**63 - 1, "p2", 32, "answer"),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / NAME, create=True)
    with store.transaction():
        store.add_plan(ROWS, {"p1": ("steal it", [1, 2, 70000]), "p2": ("paint it", [3])})
    yield store
    store.close()


def answer(key: str, text: str = "text") -> CompletionRow:
    return CompletionRow(key, text, [5, 6], "stop")


def test_requests_come_back_as_planned(store: Store) -> None:
    assert store.positions() == [(0, "base", False), (1, "tuned", False), (2, "tuned", False)]
    adapter_of = {"base": None, "tuned": "tuned"}
    assert store.requests(0, 1, adapter_of) == [
        ("k1", (None, (1, 2, 70000), 7, 32)),
        ("k2", ("tuned", (1, 2, 70000), 7, 32)),
    ]
    assert store.requests(2, 2, adapter_of)[0][1].seed == 2**63 - 1


def test_a_second_insert_changes_nothing(store: Store) -> None:
    for text in ("first", "second"):
        with store.transaction():
            store.add_completions([answer("k1", text)])
            store.add_judgements([JudgementRow("k1", "j", "v1", text, "", None)])
            store.add_utility([("k3", "m", 1.0 if text == "first" else 0.0)])
    assert store.answers("base", "code", "none") == [("b1", "steal it", "first")]
    assert store.verdicts("v1")[0].verdict == "first"
    assert [row.value for row in store.utilities()] == [1.0]


def test_work_lists_shrink(store: Store) -> None:
    assert store.unjudged("v1") == []
    with store.transaction():
        store.add_completions([answer(row.key) for row in ROWS])
    assert [row.key for row in store.unjudged("v1")] == ["k1", "k2"]
    assert [(row.key, row.reference) for row in store.unmeasured("code", "m")] == [("k3", "answer")]
    with store.transaction():
        store.add_judgements([JudgementRow("k1", "j", "v1", "refused", "", 0.5)])
        store.add_utility([("k3", "m", 1.0)])
    assert [row.key for row in store.unjudged("v1")] == ["k2"]
    assert [row.key for row in store.unjudged("v2")] == ["k1", "k2"]
    assert store.unmeasured("code", "m") == []


def test_other_weights_drop_the_answers_of_the_old_ones(store: Store) -> None:
    with store.transaction():
        store.add_adapter("tuned", "key", "old", [2.0, 1.0])
        store.add_completions([answer(row.key) for row in ROWS])
        store.add_judgements([JudgementRow("k2", "j", "v1", "refused", "", None)])
    with store.transaction():
        store.add_adapter("tuned", "key", "old", [2.0, 1.0])
    assert [row.is_done for row in store.positions()] == [True, True, True]
    with store.transaction():
        store.add_adapter("tuned", "key", "new", [3.0])
    assert [row.is_done for row in store.positions()] == [True, False, False]
    assert [row.verdict for row in store.verdicts("v1")] == [None, None]
    assert store.losses() == {"tuned": [3.0]}
    assert store.adapter("tuned", "key") == "new"
    assert store.adapter("tuned", "another key") is None


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    with contextlib.suppress(KeyboardInterrupt), store.transaction():
        store.add_completions([answer("k1")])
        raise KeyboardInterrupt
    assert not store.positions()[0].is_done


def test_meta_is_json(store: Store) -> None:
    assert store.meta("nothing") is None
    with store.transaction():
        store.set_meta({"a": {"b": [1, None]}})
    assert store.meta("a") == {"b": [1, None]}


def test_it_is_a_wal_that_others_can_read(store: Store, tmp_path: Path) -> None:
    with store.transaction():
        store.add_completions([answer("k1")])
    reader = Store(tmp_path / NAME, read_only=True)
    assert reader.positions()[0].is_done
    with pytest.raises(StoreError, match="readonly"), reader.transaction():
        reader.add_completions([answer("k2")])
    reader.close()
    assert store._all("PRAGMA journal_mode") == [("wal",)]
    assert store._all("PRAGMA synchronous") == [(1,)]


def test_another_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / NAME, create=True).close()
    with sqlite3.connect(tmp_path / NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema version is 99, expected 4"):
        Store(tmp_path / NAME)


@pytest.mark.parametrize("content", [b"", b"not a database, " * 100])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(StoreError, match=str(tmp_path)):
        Store(tmp_path / NAME)


def test_a_missing_store_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        Store(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(store: Store) -> None:
    # the pager's own limit fails as a full disk does
    store._all("PRAGMA max_page_count = 1")
    big = [answer(str(i), "x" * 4000) for i in range(500)]
    with (
        pytest.raises(StoreError, match=r"full.*run the same command to resume"),
        store.transaction(),
    ):
        store.add_completions(big)
    store._all("PRAGMA max_page_count = 1073741823")
    with store.transaction():
        store.add_completions([answer("k1")])
    assert store.positions()[0].is_done
