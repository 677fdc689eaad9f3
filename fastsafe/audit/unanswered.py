"""Judges and guards that gave no verdict: what a stage notes, and the sentences that say it.

A row without a reply has no verdict and is asked about again. Without a note, a judge that is down
would look like one that has nothing to do.
"""

from collections import Counter
from collections.abc import Sequence

from fastsafe.audit.results.schema.instruments import ReadBy, UnansweredResult
from fastsafe.audit.results.schema.run import Results
from fastsafe.audit.store.sqlite_store import Store

MAX_CAUSE = 300  # characters

_READERS: dict[ReadBy, str] = {
    "judge": "judge {}",
    "guard": "guard {}",
    "filter": "guard of mitigation {}",
}


def of(
    read_by: ReadBy, name: str, reader: object, n: int, causes: Sequence[str]
) -> list[UnansweredResult]:
    """Return the note of one judge or guard, none where it answered every row.

    Args:
        read_by: The part that it plays.
        name: Its id, or the label of its mitigation.
        reader: The judge or guard.
        n: Rows that it was asked about.
        causes: Its reason for every row that it did not answer.
    """
    if not causes:
        return []
    (cause, _), *_ = Counter(causes).most_common(1)
    return [
        {
            "read_by": read_by,
            "name": name,
            "address": getattr(reader, "address", ""),
            "n": n,
            "failed": len(causes),
            "cause": " ".join(cause[:MAX_CAUSE].split()) or "no reply",
        }
    ]


def sentence(row: UnansweredResult) -> str:
    """Return a note in words, without characters that a terminal would obey."""
    address = f" at {row['address']}" if row["address"] else ""
    reader = _READERS[row["read_by"]].format(row["name"])
    text = f"{reader}{address} gave no reply on {row['failed']} of {row['n']} rows: {row['cause']}"
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def unscored(results: Results) -> list[str]:
    """Return a sentence per judge whose replies give no verdict; asking again gives the same."""
    counts: dict[str, Counter[str]] = {}
    for cell in (*results["cells"], *results["over_refusal"]):
        counts.setdefault(cell["judge"], Counter()).update(cell["verdicts"])
    return [
        f"judge {judge} gave {count['judge_unparseable']} replies outside its grammar and "
        f"{count['judge_refused']} refusals to judge"
        for judge, count in counts.items()
        if count["judge_unparseable"] or count["judge_refused"]
    ]


def keep(store: Store, read_by: ReadBy, rows: Sequence[UnansweredResult]) -> None:
    """Store the notes of a stage in the place of its last ones."""
    if list(rows) != (store.meta(_key(read_by)) or []):
        with store.transaction():
            store.set_meta({_key(read_by): list(rows)})


def kept(store: Store) -> list[UnansweredResult]:
    """Return the notes of the last stages."""
    return [row for read_by in _READERS for row in store.meta(_key(read_by)) or []]


def _key(read_by: ReadBy) -> str:
    return f"unanswered_{read_by}"
