"""What an endpoint has answered and cost, kept across restarts in one SQLite file.

A call is booked before it is sent, with the most it can cost, and settled by what the reply says it
used: a process killed in between has over-booked, never over-spent.
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
        """Return the name of the first limit that is passed, "" for none; a limit of 0 is none."""
        for name in ("calls", "tokens", "cost"):
            if 0 < getattr(limits, name) < getattr(self, name):
                return name
        return ""


class Ledger:
    """Replies and spending; safe to share among threads, and among processes through a file."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open ``judge.sqlite`` in ``folder``, made where missing; None keeps all in memory.

        Raises:
            StoreError: The file cannot be opened or written.
        """
        self.path = ":memory:" if folder is None else str(folder / NAME)
        self._lock = threading.Lock()
        with self._explained():
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
        """Return (text, logprobs as JSON, finish) kept under ``key``."""
        with self._explained():
            query = "SELECT text, logprobs, finish FROM replies WHERE key = ?"
            row: tuple[str, str, str] | None = self._db.execute(query, (key,)).fetchone()
        return row

    def keep(self, key: str, text: str, logprobs: str, finish: str) -> None:
        """Keep a reply; one that is already there stays as it is."""
        with self._explained():
            row = (key, text, logprobs, finish)
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)

    def spent(self, account: str) -> Spending:
        """Return all that was booked on ``account`` since the file was made."""
        with self._explained():
            return self._spent(account)

    def book(self, account: str, most: Spending, limits: Spending) -> str:
        """Book one call at the most it can cost, if the limits allow it.

        Returns:
            "" when booked, else the name of the limit that would be passed: nothing is booked.
        """
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                now = self._spent(account)
                after = Spending(
                    now.calls + most.calls, now.tokens + most.tokens, now.cost + most.cost
                )
                passed = after.exceeds(limits)
                if not passed:
                    self._add(account, most)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        return passed

    def settle(self, account: str, booked: Spending, used: Spending) -> None:
        """Replace what was booked for one call by what it used."""
        with self._explained():
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
    def _explained(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise StoreError(
                    f"ledger {self.path}: cannot be used: {error}; free space or permissions there "
                    "and run the same command to resume"
                ) from error
