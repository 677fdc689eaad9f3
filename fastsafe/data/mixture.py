"""Mix safety rows into a user's fine-tuning rows, by exact counts."""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fastsafe.data.conversation import Row
from fastsafe.errors import UsageError


def safety_amount(user_amount: int, share: float) -> float:
    """Return the amount of rows or tokens that is ``share`` of a mixture with ``user_amount`` more.

    Raises:
        UsageError: ``share`` is outside [0, 1).

    Example:
        >>> round(safety_amount(90, 0.1), 6)
        10.0
    """
    if not 0 <= share < 1:
        raise UsageError(
            f"mixture: share is {share}, expected at least 0 and below 1; 0.1 mixes in ten percent"
        )
    return share * user_amount / (1 - share)


def num_safety_rows(num_user_rows: int, share: float) -> int:
    """Return the number of safety rows that are ``share`` of a mixture with ``num_user_rows`` more.

    Args:
        num_user_rows: Number of the user's rows.
        share: Fraction of the mixture that is safety rows, in [0, 1).

    Raises:
        UsageError: ``share`` is outside its range.

    Example:
        >>> num_safety_rows(90, 0.1)
        10
    """
    return round(safety_amount(num_user_rows, share))


def num_rows_for(lengths: Sequence[int], tokens: float) -> int:
    """Return the number of leading rows whose tokens come nearest to ``tokens``; of two, the fewer.

    Example:
        >>> num_rows_for([10, 10, 10], 24)
        2
    """
    sums = [0, *accumulate(lengths)]
    return min(range(len(sums)), key=lambda n: (abs(sums[n] - tokens), n))


def mix(
    rows: Sequence[Row], safety_rows: Sequence[Row], *, share: float, seed: int
) -> list[dict[str, Any]]:
    """Mix safety rows into the user's rows.

    Args:
        rows: The user's rows; not modified.
        safety_rows: The pool of safety rows; not modified. It is shuffled and repeated as often as
            needed, so that no row is used twice before all are used once.
        share: Fraction of the result that is safety rows, in [0, 1).
        seed: The same seed gives the same rows in the same order.

    Returns:
        Copies of every user row once and of ``num_safety_rows`` safety rows, shuffled, each with a
        ``source``: "user" or "safety".

    Raises:
        UsageError: ``share`` is outside its range, or needs safety rows and the pool is empty.
    """
    count = num_safety_rows(len(rows), share)
    if count and not safety_rows:
        raise UsageError(
            f"mixture: safety rows are 0, expected some for a share of {share}; "
            "supply safety rows or set the share to 0"
        )
    return _mixed(rows, safety_rows, count, seed)


def interleave(
    rows: Sequence[Row], safety_rows: Sequence[Row], *, seed: int
) -> list[dict[str, Any]]:
    """Mix like `mix`, but with every safety row once, whatever the share."""
    return _mixed(rows, safety_rows, len(safety_rows), seed)


def _mixed(
    rows: Sequence[Row], safety_rows: Sequence[Row], count: int, seed: int
) -> list[dict[str, Any]]:
    order = random.Random(seed)
    pool = list(safety_rows)
    order.shuffle(pool)
    mixed = [{**row, "source": "user"} for row in rows]
    mixed += [{**pool[i % len(pool)], "source": "safety"} for i in range(count)]
    order.shuffle(mixed)
    return mixed
