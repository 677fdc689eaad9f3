"""The run's memory: one SQLite file, the source of truth for everything that is reported.

A row is inserted once, under a key that hashes what determines it; inserting it again changes
nothing. Work lists are queries (planned and not yet there), so running again is resuming.
"""

import json
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from fastsafe.audit.rows import Answer, Asked, Guarded, Kind, PlannedRow, Target, Verdict
from fastsafe.errors import StoreError

NAME = "store.sqlite"
SCHEMA_VERSION = 2

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE prompts (
  sha256 TEXT PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL);
CREATE TABLE planned (
  position INTEGER PRIMARY KEY, key TEXT NOT NULL, condition TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('harmful', 'benign', 'utility')), part TEXT NOT NULL,
  system_prompt TEXT NOT NULL, item TEXT NOT NULL, sample INTEGER NOT NULL,
  seed INTEGER NOT NULL, prompt TEXT NOT NULL REFERENCES prompts (sha256),
  max_tokens INTEGER NOT NULL, reference TEXT, filtered_from TEXT,
  UNIQUE (condition, kind, part, system_prompt, item, sample));
CREATE TABLE adapters (
  condition TEXT PRIMARY KEY, key TEXT NOT NULL, weights_sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE losses (
  condition TEXT NOT NULL, step INTEGER NOT NULL, loss REAL NOT NULL,
  PRIMARY KEY (condition, step)) WITHOUT ROWID;
CREATE TABLE completions (
  key TEXT PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL,
  finish_reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE judgements (
  key TEXT NOT NULL, judge TEXT NOT NULL, identity TEXT NOT NULL, verdict TEXT NOT NULL,
  raw TEXT NOT NULL, score REAL, coherent INTEGER, PRIMARY KEY (key, identity)) WITHOUT ROWID;
CREATE TABLE guards (
  key TEXT NOT NULL, target TEXT NOT NULL CHECK (target IN ('prompt', 'answer')),
  identity TEXT NOT NULL, verdict TEXT NOT NULL, raw TEXT NOT NULL, score REAL,
  PRIMARY KEY (key, target, identity)) WITHOUT ROWID;
CREATE TABLE utility (
  key TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
  PRIMARY KEY (key, metric)) WITHOUT ROWID;
CREATE TABLE events (
  id INTEGER PRIMARY KEY, at TEXT NOT NULL, stage TEXT NOT NULL, detail TEXT NOT NULL);
"""


class Store:
    """One open run. All writing happens in ``transaction`` blocks of a single process.

    Threads may share it as long as only one uses it at a time.
    """

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """Open the store of a run directory.

        Raises:
            StoreError: It does not exist, is not a store, or has another schema version.
        """
        self.path = path
        mode = "rwc" if create else "ro" if read_only else "rw"
        with self._explained():
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
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
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"store {self.path}: schema version is {version}, expected {SCHEMA_VERSION}; "
                "use the fastsafe that wrote it, or another --out"
            )

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in when this was the last reader."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the writes of the block durable together, or not at all."""
        with self._explained():
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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                f"store {self.path}: cannot be used: {error}; "
                "free space or permissions there and run the same command to resume"
            ) from error

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._explained():
            return self._db.execute(query, values).fetchall()

    def meta(self, key: str) -> Any:
        """Return the JSON value of ``key``, None where it was never set."""
        rows = self._all("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def set_meta(self, values: Mapping[str, Any]) -> None:
        """Set JSON values, replacing those of the same key."""
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in values.items()],
        )

    def add_plan(
        self, rows: Iterable[PlannedRow], prompts: Mapping[str, tuple[str, Sequence[int]]]
    ) -> None:
        """Write what is to be done: rows in order, prompts (text, token ids) by sha256."""
        self._db.executemany(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)",
            [(sha, text, _packed(ids)) for sha, (text, ids) in prompts.items()],
        )
        self._db.executemany(
            "INSERT INTO planned VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((position, *astuple(row)) for position, row in enumerate(rows)),
        )

    def adapter(self, condition: str, key: str) -> str | None:
        """Return the sha256 of the weights trained under ``key``, None where there are none."""
        query = "SELECT weights_sha256 FROM adapters WHERE condition = ? AND key = ?"
        rows = self._all(query, condition, key)
        return rows[0][0] if rows else None

    def add_adapter(
        self, condition: str, key: str, weights_sha256: str, losses: Sequence[float]
    ) -> None:
        """Record a trained adapter; answers of other weights under this condition are dropped."""
        known = self._db.execute(
            "SELECT 1 FROM adapters WHERE condition = ? AND weights_sha256 = ?",
            (condition, weights_sha256),
        ).fetchone()
        if not known:
            keys = "(SELECT key FROM planned WHERE condition = ?)"
            for table in ("completions", "judgements", "utility"):
                self._db.execute(f"DELETE FROM {table} WHERE key IN {keys}", (condition,))
        self._db.execute("DELETE FROM losses WHERE condition = ?", (condition,))
        row = (condition, key, weights_sha256)
        self._db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?, ?)", row)
        self._db.executemany(
            "INSERT INTO losses VALUES (?, ?, ?)",
            [(condition, step, loss) for step, loss in enumerate(losses)],
        )

    def losses(self) -> dict[str, list[float]]:
        """Return the training loss of every step, by condition."""
        found: dict[str, list[float]] = {}
        for condition, loss in self._all(
            "SELECT condition, loss FROM losses ORDER BY condition, step"
        ):
            found.setdefault(condition, []).append(loss)
        return found

    def positions(self) -> list[tuple[int, str, bool]]:
        """Return (position, condition, is done) of every row that a model answers, in order."""
        return [
            (position, condition, bool(done))
            for position, condition, done in self._all(
                "SELECT p.position, p.condition, c.key IS NOT NULL FROM planned p"
                " LEFT JOIN completions c ON c.key = p.key"
                " WHERE p.filtered_from IS NULL ORDER BY p.position"
            )
        ]

    def unfiltered(self, condition: str) -> list[Asked]:
        """Return answers that this condition's guard has still to let through, by its own keys."""
        return [
            Asked(*row)
            for row in self._all(
                "SELECT p.key, p.kind, p.part, t.text, c.text, c.finish_reason, p.reference"
                " FROM planned p JOIN completions c ON c.key = p.filtered_from"
                " JOIN prompts t ON t.sha256 = p.prompt WHERE p.condition = ?"
                " AND NOT EXISTS (SELECT 1 FROM completions d WHERE d.key = p.key)"
                " ORDER BY p.position",
                condition,
            )
        ]

    def requests(self, first: int, last: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """Return (key, condition, token ids, seed, most tokens) of rows at [first, last]."""
        return [
            (key, condition, _unpacked(ids), seed, max_tokens)
            for key, condition, ids, seed, max_tokens in self._all(
                "SELECT p.key, p.condition, t.token_ids, p.seed, p.max_tokens FROM planned p"
                " JOIN prompts t ON t.sha256 = p.prompt"
                " WHERE p.position >= ? AND p.position <= ? AND p.filtered_from IS NULL"
                " ORDER BY p.position",
                first,
                last,
            )
        ]

    def add_completions(self, answers: Iterable[Answer]) -> None:
        """Insert answers; one that is already there stays as it is."""
        self._db.executemany(
            "INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?)",
            [(a.key, a.text, _packed(a.token_ids), a.finish_reason) for a in answers],
        )

    def unjudged(self, identity: str) -> list[Asked]:
        """Return completed probes without a judgement of this judge."""
        return self._asked(
            "p.kind != 'utility' AND NOT EXISTS"
            " (SELECT 1 FROM judgements j WHERE j.key = p.key AND j.identity = ?)",
            identity,
        )

    def add_judgements(self, verdicts: Iterable[Verdict]) -> None:
        """Insert judgements; one that is already there stays as it is."""
        self._db.executemany(
            "INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?, ?)", verdicts
        )

    def unmeasured(self, task: str, metric: str) -> list[Asked]:
        """Return utility rows of a task that the model answered and this metric has not scored."""
        return self._asked(
            "p.kind = 'utility' AND p.part = ? AND c.finish_reason != 'error' AND NOT EXISTS"
            " (SELECT 1 FROM utility u WHERE u.key = p.key AND u.metric = ?)",
            task,
            metric,
        )

    def add_utility(self, values: Iterable[tuple[str, str, float]]) -> None:
        """Insert (key, metric, value) rows; one that is already there stays as it is."""
        self._db.executemany("INSERT OR IGNORE INTO utility VALUES (?, ?, ?)", values)

    def _asked(self, where: str, *values: Any) -> list[Asked]:
        return [
            Asked(*row)
            for row in self._all(
                "SELECT DISTINCT p.key, p.kind, p.part, t.text, c.text, c.finish_reason,"
                " p.reference FROM planned p"
                " JOIN completions c ON c.key = p.key JOIN prompts t ON t.sha256 = p.prompt"
                f" WHERE {where} ORDER BY p.position",
                *values,
            )
        ]

    def verdicts(self, identity: str) -> list[tuple[str, str, str, str, str, str | None]]:
        """Return (condition, kind, part, system prompt, behaviour, verdict) of every probe.

        The verdict is None where the probe has no answer or no judgement yet.
        """
        return self._all(
            "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item, j.verdict FROM planned p"
            " LEFT JOIN judgements j ON j.key = p.key AND j.identity = ?"
            " WHERE p.kind != 'utility' AND p.sample = 0 ORDER BY p.position",
            identity,
        )

    def shortened(self, identity: str) -> list[tuple[str, str, str, str]]:
        """Return (kind, format, verdict cut short, verdict in full) of probes answered twice."""
        return self._all(
            "SELECT p.kind, p.part, a.verdict, b.verdict FROM planned p JOIN planned f"
            " USING (condition, kind, part, system_prompt, item)"
            " JOIN judgements a ON a.key = p.key AND a.identity = ?1"
            " JOIN judgements b ON b.key = f.key AND b.identity = ?1"
            " WHERE p.sample = 0 AND f.sample = 1 ORDER BY p.position",
            identity,
        )

    def incoherent(self, identity: str) -> set[tuple[str, str, str, str, str]]:
        """Return (condition, kind, format, system prompt, behaviour) of incoherent answers."""
        return {
            tuple(row)
            for row in self._all(
                "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item FROM planned p"
                " JOIN judgements j ON j.key = p.key AND j.identity = ?"
                " WHERE p.sample = 0 AND j.coherent = 0",
                identity,
            )
        }

    def unguarded(self, target: Target, identity: str) -> list[Asked]:
        """Return probes whose prompt, or answer, this guard has not seen, each once."""
        key = "p.prompt" if target == "prompt" else "p.key"
        return [
            Asked(*row)
            for row in self._all(
                f"SELECT {key}, p.kind, p.part, t.text, c.text, c.finish_reason, p.reference"
                " FROM planned p JOIN completions c ON c.key = p.key"
                " JOIN prompts t ON t.sha256 = p.prompt"
                " WHERE p.kind != 'utility' AND p.sample = 0 AND c.finish_reason != 'error'"
                f" AND NOT EXISTS (SELECT 1 FROM guards g WHERE g.key = {key}"
                f" AND g.target = ? AND g.identity = ?) GROUP BY {key} ORDER BY min(p.position)",
                target,
                identity,
            )
        ]

    def add_guarded(self, rows: Iterable[Guarded]) -> None:
        """Insert what a guard said; what is already there stays as it is."""
        self._db.executemany("INSERT OR IGNORE INTO guards VALUES (?, ?, ?, ?, ?, ?)", rows)

    def guarded(
        self, target: Target, identity: str
    ) -> list[tuple[str, str, str, str, str, str | None]]:
        """Return (condition, kind, format, system prompt, behaviour, verdict) of every probe."""
        key = "p.prompt" if target == "prompt" else "p.key"
        return self._all(
            "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item, g.verdict FROM planned p"
            f" LEFT JOIN guards g ON g.key = {key} AND g.target = ? AND g.identity = ?"
            " WHERE p.kind != 'utility' AND p.sample = 0 ORDER BY p.position",
            target,
            identity,
        )

    def utilities(self) -> list[tuple[str, str, str, str, float | None]]:
        """Return (condition, task, test row, metric, value) of every utility row."""
        return self._all(
            "SELECT p.condition, p.part, p.item, u.metric, u.value FROM planned p"
            " LEFT JOIN utility u ON u.key = p.key WHERE p.kind = 'utility' ORDER BY p.position"
        )

    def references(self) -> list[tuple[str, str, str, str]]:
        """Return (condition, task, completion, reference) of every answered utility row."""
        return self._all(
            "SELECT p.condition, p.part, c.text, p.reference FROM planned p"
            " JOIN completions c ON c.key = p.key"
            " WHERE p.kind = 'utility' AND p.reference IS NOT NULL AND c.finish_reason != 'error'"
            " ORDER BY p.position"
        )

    def answers(
        self, condition: str, kind: Kind, part: str, system_prompt: str
    ) -> list[tuple[str, str, str]]:
        """Return (behaviour, prompt, completion) of one cell's answered probes."""
        return self._all(
            "SELECT p.item, t.text, c.text FROM planned p JOIN completions c ON c.key = p.key"
            " JOIN prompts t ON t.sha256 = p.prompt"
            " WHERE p.condition = ? AND p.kind = ? AND p.part = ? AND p.system_prompt = ?"
            " ORDER BY p.position",
            condition,
            kind,
            part,
            system_prompt,
        )

    def add_event(self, at: str, stage: str, detail: Mapping[str, Any]) -> None:
        """Append a note of what happened when; never read for work lists or statistics."""
        row = (at, stage, json.dumps(detail))
        self._db.execute("INSERT INTO events (at, stage, detail) VALUES (?, ?, ?)", row)

    def events(self, stage: str) -> list[dict[str, Any]]:
        """Return the details of every event of a stage, oldest first."""
        found = self._all("SELECT detail FROM events WHERE stage = ? ORDER BY id", stage)
        return [json.loads(detail) for (detail,) in found]


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


def _unpacked(blob: bytes) -> tuple[int, ...]:
    return tuple(array("i", blob))
