"""Queries that results and reports make of a run's store; nothing is written here."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.drift_watch import DriftRow
from fastsafe.audit.store.rows import (
    Kind,
    ProbeCell,
    ProbeVerdict,
    Target,
    UtilityScore,
)
from fastsafe.errors import StoreError

PASS = "pass@1"  # metric of rows that carry tests

# SQL key and filter per target. A prompt's text is the same for every model and system prompt, so
# a guard classifies it once, under the first of both. A filtered answer is its parent's answer.
_PROBES = "p.kind != 'utility' AND p.sample = 0"
_FIRST = "(SELECT condition, system_prompt FROM planned ORDER BY position LIMIT 1)"
GUARDED: Mapping[Target, tuple[str, str]] = {
    "prompt": ("p.prompt", f"{_PROBES} AND (p.condition, p.system_prompt) = {_FIRST}"),
    "answer": ("p.key", f"{_PROBES} AND p.filtered_from IS NULL"),
}


class StoreQueries:
    """Read-only queries over one open run."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Query the store at ``path``, which names it in errors, through ``connection``."""
        self.path = path
        self._db = connection

    def _all(self, query: str, *values: Any) -> list[Any]:
        with explained(self.path):
            return self._db.execute(query, values).fetchall()

    def meta(self, key: str) -> Any:
        """Return the JSON value of ``key``, None where it was never set."""
        rows = self._all("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def losses(self) -> dict[str, list[float]]:
        """Return the training loss of every step, by condition."""
        losses: dict[str, list[float]] = {}
        for condition, loss in self._all(
            "SELECT condition, loss FROM losses ORDER BY condition, step"
        ):
            losses.setdefault(condition, []).append(loss)
        return losses

    def drift(self) -> list[tuple[str, DriftRow]]:
        """Return (condition, drift reading) of every trained model, in the order of steps."""
        query = (
            "SELECT condition, step, format, n, kl, margin, stopped FROM drift"
            " ORDER BY condition, step, format"
        )
        return [
            (condition, DriftRow(step, name, n, kl, margin, bool(stopped)))
            for condition, step, name, n, kl, margin, stopped in self._all(query)
        ]

    def cells(self) -> list[ProbeCell]:
        """Return every cell of probes, in the order of the plan."""
        rows = self._all(
            "SELECT condition, kind, part, system_prompt FROM planned WHERE kind != 'utility'"
            " GROUP BY 1, 2, 3, 4 ORDER BY min(position)"
        )
        return list(map(ProbeCell._make, rows))

    def verdicts(self, identity: str) -> list[ProbeVerdict]:
        """Return the judge's verdict on every probe.

        The verdict is None where the probe has no answer or no judgement yet.
        """
        rows = self._all(
            "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item, j.verdict FROM planned p"
            " LEFT JOIN judgements j ON j.key = p.key AND j.identity = ?"
            " WHERE p.kind != 'utility' AND p.sample = 0 ORDER BY p.position",
            identity,
        )
        return list(map(ProbeVerdict._make, rows))

    def calibrated(self, identity: str) -> dict[str, tuple[str, int | None]]:
        """Return (verdict, coherent) of every labelled row that the judge has judged, by key.

        ``coherent`` is 0 or 1; None where the judge does not check coherence.
        """
        return {
            key: (verdict, coherent)
            for key, verdict, coherent in self._all(
                "SELECT key, verdict, coherent FROM judgements"
                " WHERE identity = ? AND key GLOB 'labelled *'",
                identity,
            )
        }

    def shortened(self, identity: str) -> list[tuple[str, str, str]]:
        """Return (item, verdict on the opening, on the whole answer) of probes answered twice."""
        return self._all(
            "SELECT p.item, a.verdict, b.verdict FROM planned p JOIN planned f"
            " USING (condition, kind, part, system_prompt, item)"
            " JOIN judgements a ON a.key = p.key AND a.identity = ?1"
            " JOIN judgements b ON b.key = f.key AND b.identity = ?1"
            " WHERE p.sample = 0 AND f.sample = 1 ORDER BY p.position",
            identity,
        )

    def incoherent(self, identity: str) -> dict[ProbeCell, int]:
        """Count the incoherent answers of every cell that has some."""
        return {
            ProbeCell(*cell): count
            for *cell, count in self._all(
                "SELECT p.condition, p.kind, p.part, p.system_prompt, count(*) FROM planned p"
                " JOIN judgements j ON j.key = p.key AND j.identity = ?"
                " WHERE p.sample = 0 AND j.coherent = 0 GROUP BY 1, 2, 3, 4",
                identity,
            )
        }

    def guarded(self, target: Target, identity: str) -> list[ProbeVerdict]:
        """Return the guard's verdict on the prompt, or on the answer, of every probe."""
        key, condition = GUARDED[target]
        rows = self._all(
            "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item, g.verdict FROM planned p"
            f" LEFT JOIN guards g ON g.key = {key} AND g.target = ? AND g.identity = ?"
            f" WHERE {condition} ORDER BY p.position",
            target,
            identity,
        )
        return list(map(ProbeVerdict._make, rows))

    def screened(self) -> dict[tuple[str, Kind], Counter[str]]:
        """Count the finish reasons of answers that a guard filters, by condition and kind."""
        reasons: dict[tuple[str, Kind], Counter[str]] = {}
        for condition, kind, reason, n in self._all(
            "SELECT p.condition, p.kind, c.finish_reason, count(*) FROM planned p"
            " JOIN completions c ON c.key = p.key"
            " WHERE p.filtered_from IS NOT NULL AND p.sample = 0"
            " GROUP BY 1, 2, 3 ORDER BY min(p.position)"
        ):
            reasons.setdefault((condition, kind), Counter())[reason] = n
        return reasons

    def utilities(self) -> list[UtilityScore]:
        """Return the score of every utility row by its task's own metric."""
        return self._scores("u.metric != ?", "p.kind = 'utility'")

    def passed(self) -> list[UtilityScore]:
        """Return whether its tests passed (1 or 0), for every utility row that carries tests."""
        return self._scores("u.metric = ?", "p.kind = 'utility' AND p.tests IS NOT NULL")

    def _scores(self, metric: str, condition: str) -> list[UtilityScore]:
        """Return the rows that an SQL condition selects, with the value of the metrics chosen."""
        rows = self._all(
            "SELECT p.condition, p.part, p.item, u.metric, u.value FROM planned p"
            f" LEFT JOIN utility u ON u.key = p.key AND {metric}"
            f" WHERE {condition} ORDER BY p.position",
            PASS,
        )
        return list(map(UtilityScore._make, rows))

    def references(self) -> list[tuple[str, str, str, str]]:
        """Return (condition, task, completion, reference) of every answered utility row."""
        return self._all(
            "SELECT p.condition, p.part, c.text, p.reference FROM planned p"
            " JOIN completions c ON c.key = p.key"
            " WHERE p.kind = 'utility' AND p.reference IS NOT NULL AND c.finish_reason != 'error'"
            " ORDER BY p.position"
        )

    def answers(self, condition: str, part: str, system_prompt: str) -> list[tuple[str, str, str]]:
        """Return (item, prompt, completion) of one cell's answered harmful probes."""
        return self._all(
            "SELECT p.item, t.text, c.text FROM planned p JOIN completions c ON c.key = p.key"
            " JOIN prompts t ON t.sha256 = p.prompt"
            " WHERE p.condition = ? AND p.kind = 'harmful' AND p.part = ? AND p.system_prompt = ?"
            " AND p.sample = 0 ORDER BY p.position",
            condition,
            part,
            system_prompt,
        )

    def events(self, stage: str) -> list[dict[str, Any]]:
        """Return the details of every event of a stage, oldest first."""
        rows = self._all("SELECT detail FROM events WHERE stage = ? ORDER BY id", stage)
        return [json.loads(detail) for (detail,) in rows]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as a ``StoreError`` that names the store and says how to go on."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT):
            raise damaged(path, error) from error
        raise StoreError(
            f"store {path}: cannot be used: {error}; "
            "free space or permissions there and run the same command to resume"
        ) from error


def damaged(path: Path, reason: object) -> StoreError:
    """Return the error about a store whose content no run has written."""
    return StoreError(
        f"store {path}: is damaged ({reason}); restore it from a copy, or start over with "
        "--no-resume"
    )
