"""Find damage in a store when it is opened: what SQLite finds, and values that no run writes."""

import hashlib
import json
import sqlite3

from fastsafe.safety.verdict import Verdict

SEAL = "sealed_sha256"  # key in table meta
_TOKENS = "typeof(text) != 'text' OR typeof(token_ids) != 'blob' OR length(token_ids) % 4"
_VERDICT = f"verdict NOT IN ({', '.join(repr(str(verdict)) for verdict in Verdict)})"
_NUMBER = "(typeof({0}) NOT IN ('real', 'integer') OR abs({0}) > 1.7976931348623157e308)"
_SCORE = f"score IS NOT NULL AND {_NUMBER.format('score')}"
# the numbers that the throughput of each stage is computed from
_COUNTS = {
    "train": ("duration_s", "steps", "rows"),
    "generate": ("duration_s", "rows", "prompt_tokens", "completion_tokens"),
}
_UNCOUNTED = " OR ".join(
    f"(stage = '{stage}' AND"
    f" coalesce(json_type(detail, '$.{name}'), '') NOT IN ('integer', 'real'))"
    for stage, names in _COUNTS.items()
    for name in names
)
# what a run set out to do: its settings, and the cells of its plan
_SEALED = (
    f"SELECT key, value FROM meta WHERE key NOT IN ('{SEAL}', 'started_at', 'finished_at')"
    " ORDER BY key",
    "SELECT condition, kind, part, system_prompt, count(*) FROM planned GROUP BY 1, 2, 3, 4"
    " ORDER BY 1, 2, 3, 4",
)
# table -> SQL condition that no row fulfils unless the file is damaged
_DAMAGED = {
    "meta": "key IN ('started_at', 'finished_at')"
    " AND (NOT json_valid(value) OR json_type(value) NOT IN ('text', 'null'))",
    "prompts": _TOKENS,
    "completions": f"{_TOKENS} OR typeof(finish_reason) != 'text'",
    "planned": f"{_NUMBER.format('seed')} OR {_NUMBER.format('max_tokens')}"
    " OR typeof(part) != 'text' OR typeof(item) != 'text'",
    "judgements": f"{_VERDICT} OR typeof(raw) != 'text' OR {_SCORE}",
    "guards": "verdict NOT IN ('safe', 'unsafe', 'unreadable') OR typeof(raw) != 'text'"
    f" OR {_SCORE}",
    "losses": _NUMBER.format("loss"),
    "drift": f"{_NUMBER.format('kl')} OR {_NUMBER.format('margin')}",
    "utility": _NUMBER.format("value"),
    "events": f"NOT json_valid(detail) OR {_UNCOUNTED}",
}


def seal(connection: sqlite3.Connection) -> None:
    """Record the hash of what the run set out to do, by which damage to it is noticed."""
    row = (SEAL, json.dumps(_sealed(connection)))
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", row)


def _sealed(connection: sqlite3.Connection) -> str:
    rows = [connection.execute(query).fetchall() for query in _SEALED]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def damage(connection: sqlite3.Connection) -> str:
    """Return what is wrong with the store, "" where nothing is found.

    Raises:
        sqlite3.DatabaseError: SQLite cannot read it.
    """
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        return str(found)
    query = "SELECT value FROM meta WHERE key = ?"
    recorded = connection.execute(query, (SEAL,)).fetchone()
    if recorded and recorded[0] != json.dumps(_sealed(connection)):  # older runs have none
        return "its settings or its plan are not those that it was made with"
    for table, condition in _DAMAGED.items():
        query = f"SELECT count(*) FROM {table} WHERE {condition}"
        (count,) = connection.execute(query).fetchone()
        if count:
            return f"table {table} has {count} rows that no run writes"
    return ""
