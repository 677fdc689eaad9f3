"""The store of a run: one SQLite file, the source of truth for everything that is reported.

A row is inserted once, under a key that hashes what determines it; inserting it again changes
nothing. Work lists are queries (planned and not yet there), so running again is resuming.
"""

import json
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.drift_watch import DriftRow
from fastsafe.audit.backend.protocol import Request
from fastsafe.audit.store.damage import damage, seal
from fastsafe.audit.store.queries import GUARDED, PASS, StoreQueries, damaged, explained
from fastsafe.audit.store.rows import (
    AnsweredRow,
    CompletionRow,
    GuardRow,
    JudgementRow,
    PlannedRow,
    PositionStatus,
    Target,
)
from fastsafe.errors import StoreError

NAME = "store.sqlite"
SCHEMA_VERSION = 4


def now() -> str:
    """Return the UTC time as results hold it; no row's identity depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Store(StoreQueries):
    """One open run. All writing happens in ``transaction`` blocks of a single process.

    Threads may share it as long as only one uses it at a time.
    """

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """Open the store of a run directory.

        Raises:
            StoreError: It does not exist, is not a store or damaged, or has another schema version.
        """
        mode = "rwc" if create else "ro" if read_only else "rw"
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        with explained(path):
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False
            )
            super().__init__(path, connection)
            try:
                self._prepare(create, read_only)
            except BaseException:
                self._db.close()
                raise

    def _prepare(self, create: bool, read_only: bool) -> None:
        if not read_only:
            # WAL where the file system has shared memory, else SQLite keeps its rollback journal
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if create and version == 0:
            with self.transaction():
                for statement in _tables().split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"store {self.path}: schema version is {version}, expected {SCHEMA_VERSION}; "
                "use the fastsafe that wrote it, or another --out"
            )
        elif reason := damage(self._db):
            raise damaged(self.path, reason)

    def close(self) -> None:
        """Close the file; the last connection to close folds the write-ahead log into it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the writes of the block durable together, or not at all."""
        with explained(self.path):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._commit()
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def set_meta(self, values: Mapping[str, Any]) -> None:
        """Set JSON values, replacing those of the same key."""
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in values.items()],
        )
        seal(self._db)

    def add_plan(
        self, rows: Iterable[PlannedRow], prompts: Mapping[str, tuple[str, Sequence[int]]]
    ) -> None:
        """Insert the planned rows in order, and their prompts (text, token ids) by sha256."""
        self._db.executemany(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)",
            [(sha, text, _packed(ids)) for sha, (text, ids) in prompts.items()],
        )
        self._db.executemany(
            "INSERT INTO planned VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((position, *vars(row).values()) for position, row in enumerate(rows)),
        )
        seal(self._db)

    def adapter(self, condition: str, key: str) -> str | None:
        """Return the sha256 of the weights trained under ``key``, None where none are recorded."""
        query = "SELECT weights_sha256 FROM adapters WHERE condition = ? AND key = ?"
        rows = self._all(query, condition, key)
        return rows[0][0] if rows else None

    def add_adapter(
        self,
        condition: str,
        key: str,
        weights_sha256: str,
        losses: Sequence[float],
        dependents: Sequence[str] = (),
        drift: Sequence[DriftRow] = (),
    ) -> None:
        """Record an adapter; rows that depend on other weights of this condition are deleted.

        Args:
            condition: Condition that the adapter belongs to.
            key: Hash of everything that it was made from.
            weights_sha256: Hash of its weights.
            losses: Training loss of every step; empty where nothing was trained.
            dependents: Conditions that serve this adapter or are made from it.
            drift: Drift readings taken while it was trained.
        """
        is_same = self._db.execute(
            "SELECT 1 FROM adapters WHERE condition = ? AND weights_sha256 = ?",
            (condition, weights_sha256),
        ).fetchone()
        if not is_same:
            keys = "(SELECT key FROM planned WHERE condition = ?)"
            for other in (condition, *dependents):
                self._db.execute("DELETE FROM adapters WHERE condition = ?", (other,))
                # a guard's row has a prompt's key, which stays, or an answer's
                for table in ("completions", "judgements", "guards", "utility"):
                    self._db.execute(f"DELETE FROM {table} WHERE key IN {keys}", (other,))
        for table in ("losses", "drift"):
            self._db.execute(f"DELETE FROM {table} WHERE condition = ?", (condition,))
        row = (condition, key, weights_sha256)
        self._db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?, ?)", row)
        self._db.executemany(
            "INSERT INTO losses VALUES (?, ?, ?)",
            [(condition, step, loss) for step, loss in enumerate(losses)],
        )
        self._db.executemany(
            "INSERT INTO drift VALUES (?, ?, ?, ?, ?, ?, ?)", [(condition, *row) for row in drift]
        )

    def positions(self) -> list[PositionStatus]:
        """Return, in order, whether each row that a model answers has its completion."""
        return [
            PositionStatus(position, condition, bool(done))
            for position, condition, done in self._all(
                "SELECT p.position, p.condition, c.key IS NOT NULL FROM planned p"
                " LEFT JOIN completions c ON c.key = p.key"
                " WHERE p.filtered_from IS NULL ORDER BY p.position"
            )
        ]

    def unfiltered(self, condition: str) -> list[AnsweredRow]:
        """Return the answers that this condition's guard has not filtered yet, by its own keys."""
        return self._answered(
            "p.condition = ? AND NOT EXISTS (SELECT 1 FROM completions d WHERE d.key = p.key)",
            condition,
            answer="p.filtered_from",
        )

    def requests(
        self, first: int, last: int, adapter_of: Mapping[str, str | None]
    ) -> list[tuple[str, Request]]:
        """Return (key, request) of the rows at positions ``first`` to ``last``, both included.

        Args:
            first: Position of the first row.
            last: Position of the last row.
            adapter_of: Adapter that answers, by condition; None is the base.
        """
        return [
            (key, Request(adapter_of[condition], _unpacked(ids), seed, max_tokens))
            for key, condition, ids, seed, max_tokens in self._all(
                "SELECT p.key, p.condition, t.token_ids, p.seed, p.max_tokens FROM planned p"
                " JOIN prompts t ON t.sha256 = p.prompt"
                " WHERE p.position >= ? AND p.position <= ? AND p.filtered_from IS NULL"
                " ORDER BY p.position",
                first,
                last,
            )
        ]

    def add_completions(self, answers: Iterable[CompletionRow]) -> None:
        """Insert completions; a key that is already there keeps its row."""
        self._db.executemany(
            "INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?)",
            [(a.key, a.text, _packed(a.token_ids), a.finish_reason) for a in answers],
        )

    def unjudged(self, identity: str) -> list[AnsweredRow]:
        """Return the completed probes that this judge has not judged."""
        return self._answered(
            "p.kind != 'utility' AND NOT EXISTS"
            " (SELECT 1 FROM judgements j WHERE j.key = p.key AND j.identity = ?)",
            identity,
        )

    def add_judgements(self, verdicts: Iterable[JudgementRow]) -> None:
        """Insert judgements; a key that is already there keeps its row."""
        self._db.executemany(
            "INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?, ?)", verdicts
        )

    def unmeasured(self, task: str, metric: str) -> list[AnsweredRow]:
        """Return the answered utility rows of a task that this metric has not scored."""
        return self._answered(
            "p.kind = 'utility' AND p.part = ? AND c.finish_reason != 'error' AND NOT EXISTS"
            " (SELECT 1 FROM utility u WHERE u.key = p.key AND u.metric = ?)",
            task,
            metric,
        )

    def add_utility(self, values: Iterable[tuple[str, str, float]]) -> None:
        """Insert (key, metric, value) rows; a key that is already there keeps its row."""
        self._db.executemany("INSERT OR IGNORE INTO utility VALUES (?, ?, ?)", values)

    def _answered(
        self,
        condition: str,
        *values: Any,
        key: str = "p.key",
        answer: str = "p.key",
        once_per: str = "1, 2, 3, 4, 5, 6, 7",
    ) -> list[AnsweredRow]:
        """Return the rows that an SQL condition selects, each once, with ``answer``'s text."""
        return [
            AnsweredRow(*row)
            for row in self._all(
                f"SELECT {key}, p.kind, p.part, t.text, c.text, c.finish_reason, p.reference"
                f" FROM planned p JOIN completions c ON c.key = {answer}"
                " JOIN prompts t ON t.sha256 = p.prompt"
                f" WHERE {condition} GROUP BY {once_per} ORDER BY min(p.position)",
                *values,
            )
        ]

    def unguarded(self, target: Target, identity: str) -> list[AnsweredRow]:
        """Return the probes whose prompt, or answer, this guard has not classified, each once."""
        key, condition = GUARDED[target]
        return self._answered(
            f"{condition} AND c.finish_reason != 'error' AND NOT EXISTS (SELECT 1 FROM guards g"
            f" WHERE g.key = {key} AND g.target = ? AND g.identity = ?)",
            target,
            identity,
            key=key,
            once_per="1",
        )

    def add_guarded(self, rows: Iterable[GuardRow]) -> None:
        """Insert guards' verdicts; a key that is already there keeps its row."""
        self._db.executemany("INSERT OR IGNORE INTO guards VALUES (?, ?, ?, ?, ?, ?)", rows)

    def untested(self) -> list[tuple[str, str, str]]:
        """Return (key, completion, tests) of the answered rows whose tests have not run."""
        return self._all(
            "SELECT DISTINCT p.key, c.text, p.tests FROM planned p"
            " JOIN completions c ON c.key = p.key"
            " WHERE p.tests IS NOT NULL AND c.finish_reason != 'error' AND NOT EXISTS"
            " (SELECT 1 FROM utility u WHERE u.key = p.key AND u.metric = ?) ORDER BY p.position",
            PASS,
        )

    def add_event(self, at: str, stage: str, detail: Mapping[str, Any]) -> None:
        """Append an event; work lists and statistics never read events."""
        row = (at, stage, json.dumps(detail))
        self._db.execute("INSERT INTO events (at, stage, detail) VALUES (?, ?, ?)", row)


def _tables() -> str:
    return files(__package__).joinpath("store.sql").read_text(encoding="utf-8")


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


def _unpacked(blob: bytes) -> tuple[int, ...]:
    return tuple(array("i", blob))
