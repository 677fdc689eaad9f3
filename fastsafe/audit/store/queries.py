"""What the store of a run holds, as reports read it; nothing is written here."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.drift_watch import DriftRow
from fastsafe.audit.store.rows import Kind, Target
from fastsafe.errors import StoreError

PASS = "pass@1"  # metric of rows that carry tests

# The key of what a guard reads, and where it stands. The text of a prompt hangs on neither model
# nor system prompt: the first ones stand for all. What a guard let through is its parent's answer.
_PROBES = "p.kind != 'utility' AND p.sample = 0"
_FIRST = "(SELECT condition, system_prompt FROM planned ORDER BY position LIMIT 1)"
GUARDED: Mapping[Target, tuple[str, str]] = {
    "prompt": ("p.prompt", f"{_PROBES} AND (p.condition, p.system_prompt) = {_FIRST}"),
    "answer": ("p.key", f"{_PROBES} AND p.filtered_from IS NULL"),
}


class Records:
    """Queries over one open run."""

    path: Path
    _db: sqlite3.Connection

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

    def losses(self) -> dict[str, list[float]]:
        """Return the training loss of every step, by condition."""
        found: dict[str, list[float]] = {}
        for condition, loss in self._all(
            "SELECT condition, loss FROM losses ORDER BY condition, step"
        ):
            found.setdefault(condition, []).append(loss)
        return found

    def drift(self) -> list[tuple[str, DriftRow]]:
        """Return (condition, reading) of every trained model, in the order of steps."""
        query = (
            "SELECT condition, step, format, n, kl, margin, stopped FROM drift"
            " ORDER BY condition, step, format"
        )
        return [
            (condition, DriftRow(step, name, n, kl, margin, bool(stopped)))
            for condition, step, name, n, kl, margin, stopped in self._all(query)
        ]

    def cells(self) -> list[tuple[str, str, str, str]]:
        """Return (condition, kind, format, system prompt) of every cell of probes."""
        return self._all(
            "SELECT condition, kind, part, system_prompt FROM planned WHERE kind != 'utility'"
            " GROUP BY 1, 2, 3, 4 ORDER BY min(position)"
        )

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

    def calibrated(self, identity: str) -> dict[str, tuple[str, int | None]]:
        """Return (verdict, whether coherent) of every labelled row that a judge has read."""
        return {
            key: (verdict, coherent)
            for key, verdict, coherent in self._all(
                "SELECT key, verdict, coherent FROM judgements"
                " WHERE identity = ? AND key GLOB 'labelled *'",
                identity,
            )
        }

    def shortened(self, identity: str) -> list[tuple[str, str, str]]:
        """Return (behaviour, verdict cut short, verdict in full) of probes answered twice."""
        return self._all(
            "SELECT p.item, a.verdict, b.verdict FROM planned p JOIN planned f"
            " USING (condition, kind, part, system_prompt, item)"
            " JOIN judgements a ON a.key = p.key AND a.identity = ?1"
            " JOIN judgements b ON b.key = f.key AND b.identity = ?1"
            " WHERE p.sample = 0 AND f.sample = 1 ORDER BY p.position",
            identity,
        )

    def incoherent(self, identity: str) -> dict[tuple[str, str, str, str], int]:
        """Count incoherent answers by (condition, kind, format, system prompt)."""
        return {
            tuple(cell): count
            for *cell, count in self._all(
                "SELECT p.condition, p.kind, p.part, p.system_prompt, count(*) FROM planned p"
                " JOIN judgements j ON j.key = p.key AND j.identity = ?"
                " WHERE p.sample = 0 AND j.coherent = 0 GROUP BY 1, 2, 3, 4",
                identity,
            )
        }

    def guarded(
        self, target: Target, identity: str
    ) -> list[tuple[str, str, str, str, str, str | None]]:
        """Return (condition, kind, format, system prompt, behaviour, verdict) of what it reads."""
        key, where = GUARDED[target]
        return self._all(
            "SELECT p.condition, p.kind, p.part, p.system_prompt, p.item, g.verdict FROM planned p"
            f" LEFT JOIN guards g ON g.key = {key} AND g.target = ? AND g.identity = ?"
            f" WHERE {where} ORDER BY p.position",
            target,
            identity,
        )

    def screened(self) -> list[tuple[str, str, str, int]]:
        """Count (condition, kind, how the answer ended) where a guard stands behind a model."""
        return self._all(
            "SELECT p.condition, p.kind, c.finish_reason, count(*) FROM planned p"
            " JOIN completions c ON c.key = p.key"
            " WHERE p.filtered_from IS NOT NULL AND p.sample = 0"
            " GROUP BY 1, 2, 3 ORDER BY min(p.position)"
        )

    def utilities(self) -> list[tuple[str, str, str, str, float | None]]:
        """Return (condition, task, test row, metric, value) of every utility row.

        The metric is its task's own; ``passed`` has what tests say.
        """
        return self._all(
            "SELECT p.condition, p.part, p.item, u.metric, u.value FROM planned p"
            " LEFT JOIN utility u ON u.key = p.key AND u.metric != ?"
            " WHERE p.kind = 'utility' ORDER BY p.position",
            PASS,
        )

    def passed(self) -> list[tuple[str, str, str, float | None]]:
        """Return (condition, task, test row, whether it passed) of every row that carries tests."""
        return self._all(
            "SELECT p.condition, p.part, p.item, u.value FROM planned p"
            " LEFT JOIN utility u ON u.key = p.key AND u.metric = ?"
            " WHERE p.kind = 'utility' AND p.tests IS NOT NULL ORDER BY p.position",
            PASS,
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
            " AND p.sample = 0 ORDER BY p.position",
            condition,
            kind,
            part,
            system_prompt,
        )

    def events(self, stage: str) -> list[dict[str, Any]]:
        """Return the details of every event of a stage, oldest first."""
        found = self._all("SELECT detail FROM events WHERE stage = ? ORDER BY id", stage)
        return [json.loads(detail) for (detail,) in found]
