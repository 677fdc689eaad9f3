"""Find damage in a store when it is opened: what SQLite finds, and values that no run writes."""

import hashlib
import json
import sqlite3

from fastsafe.safety.verdict import Verdict

_TOKENS = "typeof(text) != 'text' OR typeof(token_ids) != 'blob' OR length(token_ids) % 4"
_VERDICT = f"verdict NOT IN ({', '.join(repr(str(verdict)) for verdict in Verdict)})"
_NUMBER = "(typeof({0}) NOT IN ('real', 'integer') OR abs({0}) > 1.7976931348623157e308)"
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
# table -> SQL condition that no row fulfils unless the file is damaged
_DAMAGED = {
    "prompts": _TOKENS,
    "completions": f"{_TOKENS} OR typeof(finish_reason) != 'text'",
    "planned": f"{_NUMBER.format('seed')} OR {_NUMBER.format('max_tokens')}"
    " OR typeof(part) != 'text' OR typeof(item) != 'text'",
    "judgements": f"{_VERDICT} OR typeof(raw) != 'text'",
    "guards": "verdict NOT IN ('safe', 'unsafe', 'unreadable') OR typeof(raw) != 'text'",
    "losses": _NUMBER.format("loss"),
    "drift": f"{_NUMBER.format('kl')} OR {_NUMBER.format('margin')}",
    "utility": _NUMBER.format("value"),
    "events": f"NOT json_valid(detail) OR {_UNCOUNTED}",
}
META_DIGEST = "sha256"  # key in table meta


def meta_digest(connection: sqlite3.Connection) -> str:
    """Return the JSON text of the sha256 of what the run set out to do: all of meta but times."""
    rows = connection.execute(
        "SELECT key, value FROM meta WHERE key != ? AND key NOT IN ('started_at', 'finished_at')"
        " ORDER BY key",
        (META_DIGEST,),
    ).fetchall()
    return json.dumps(hashlib.sha256(repr(rows).encode()).hexdigest())


def damage(connection: sqlite3.Connection) -> str:
    """Return what is wrong with the store, "" where nothing is found.

    Raises:
        sqlite3.DatabaseError: SQLite cannot read it.
    """
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        return str(found)
    recorded = connection.execute("SELECT value FROM meta WHERE key = ?", (META_DIGEST,)).fetchone()
    if recorded and recorded[0] != meta_digest(connection):  # older runs have none
        return "table meta has values that no run writes"
    for table, condition in _DAMAGED.items():
        query = f"SELECT count(*) FROM {table} WHERE {condition}"
        (count,) = connection.execute(query).fetchone()
        if count:
            return f"table {table} has {count} rows that no run writes"
    return ""
