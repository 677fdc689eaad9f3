"""Replies and spending of an endpoint, kept across restarts in one SQLite file.

A call is booked at its maximum cost before it is sent, and settled by the usage that the reply
states: a process that is killed in between has booked too much, and never spent too much.
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastsafe.errors import StoreError

NAME = "judge.sqlite"

_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
  key TEXT PRIMARY KEY, text TEXT NOT NULL, logprobs TEXT NOT NULL, finish TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (
  account TEXT PRIMARY KEY, calls INTEGER NOT NULL, tokens INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Spending:
    """Calls, tokens in and out, and money in the unit of the prices."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    def exceeds(self, limits: "Spending") -> str:
        """Return the name of the first limit exceeded, "" for none; a limit of 0 is none."""
        for name in ("calls", "tokens", "cost"):
            if 0 < getattr(limits, name) < getattr(self, name):
                return name
        return ""


class Ledger:
    """Replies and spending; safe to share among threads, and among processes through a file."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open ``judge.sqlite`` in a folder, created where missing; None keeps all in memory.

        Raises:
            StoreError: The file cannot be opened or written.
        """
        self.path = ":memory:" if folder is None else str(folder / NAME)
        self._lock = threading.Lock()
        with self._as_store_error():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path, timeout=30, isolation_level=None, check_same_thread=False
            )
            weakref.finalize(self, self._db.close)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_TABLES)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def reply(self, key: str) -> tuple[str, str, str] | None:
        """Return the reply stored under a key: text, log-probabilities as JSON, finish."""
        with self._as_store_error():
            query = "SELECT text, logprobs, finish FROM replies WHERE key = ?"
            row: tuple[str, str, str] | None = self._db.execute(query, (key,)).fetchone()
        return row

    def keep(self, key: str, text: str, logprobs: str, finish: str) -> None:
        """Store a reply; an existing one is not replaced."""
        with self._as_store_error():
            row = (key, text, logprobs, finish)
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)

    def spent(self, account: str) -> Spending:
        """Return the spending of an account over all runs."""
        with self._as_store_error():
            return self._spent(account)

    def book(self, account: str, maximum: Spending, limits: Spending) -> str:
        """Book one call at its maximum cost, if the limits allow it.

        Returns:
            "" when booked; else the name of the limit that it would exceed, and nothing is booked.
        """
        with self._as_store_error():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                now = self._spent(account)
                after = Spending(
                    now.calls + maximum.calls,
                    now.tokens + maximum.tokens,
                    now.cost + maximum.cost,
                )
                exceeded = after.exceeds(limits)
                if not exceeded:
                    self._add(account, maximum)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        return exceeded

    def settle(self, account: str, booked: Spending, used: Spending) -> None:
        """Replace the amount booked for one call by its actual usage."""
        with self._as_store_error():
            change = Spending(
                used.calls - booked.calls, used.tokens - booked.tokens, used.cost - booked.cost
            )
            self._add(account, change)

    def _spent(self, account: str) -> Spending:
        query = "SELECT calls, tokens, cost FROM spent WHERE account = ?"
        return Spending(*(self._db.execute(query, (account,)).fetchone() or ()))

    def _add(self, account: str, change: Spending) -> None:
        self._db.execute(
            "INSERT INTO spent VALUES (?1, ?2, ?3, ?4) ON CONFLICT (account) DO UPDATE SET"
            " calls = calls + ?2, tokens = tokens + ?3, cost = cost + ?4",
            (account, change.calls, change.tokens, change.cost),
        )

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise StoreError(
                    f"ledger {self.path}: cannot be used: {error}; free space or permissions there "
                    "and run the same command to resume"
                ) from error
