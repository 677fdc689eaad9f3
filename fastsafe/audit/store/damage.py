"""Find damage in a store when it is opened: what SQLite finds, and values that no run writes."""

import sqlite3

from fastsafe.safety.verdict import Verdict

_TOKENS = "typeof(text) != 'text' OR typeof(token_ids) != 'blob' OR length(token_ids) % 4"
_VERDICT = f"verdict NOT IN ({', '.join(repr(str(verdict)) for verdict in Verdict)})"
_NUMBER = "typeof({0}) NOT IN ('real', 'integer')"
_OBJECTS = "'settings', 'engine', 'templates', 'recipe', 'judges', 'guards', 'wordings'"
_LISTS = "'conditions', 'harmful_only', 'rewrites'"
# a condition is an object of texts and numbers
_NESTED = (
    "EXISTS (SELECT 1 FROM json_each(meta.value) AS condition WHERE condition.type != 'object'"
    " OR EXISTS (SELECT 1 FROM json_each(condition.value) AS field"
    " WHERE field.type IN ('object', 'array')))"
)
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
    "meta": f"NOT json_valid(value) OR (key IN ({_OBJECTS}) AND json_type(value) != 'object')"
    f" OR (key IN ({_LISTS}) AND json_type(value) != 'array')"
    f" OR (key = 'conditions' AND {_NESTED})",
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


def damage(connection: sqlite3.Connection) -> str:
    """Return what is wrong with the store, "" where nothing is found.

    Raises:
        sqlite3.DatabaseError: SQLite cannot read it.
    """
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        return str(found)
    for table, condition in _DAMAGED.items():
        query = f"SELECT count(*) FROM {table} WHERE {condition}"
        (count,) = connection.execute(query).fetchone()
        if count:
            return f"table {table} has {count} rows that no run writes"
    return ""
