"""Rows that say the same twice: `duplicate` and `near_duplicate` (L2).

A duplicate has the prompt of an earlier row, but for case, punctuation and spacing: all of them
are found. Prompts of near-duplicates share four of five runs of three words, template aside: all
such pairs are found, so that one changed word in 29 is seen, and a paraphrase is not. Runs that
more than 2 % of the rows hold (and more than 5, at most 200, rows) count as template: of a prompt
that is nearly repeated in so many rows nothing is said. The time is linear in the rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._items import Declared, Finding, Item, Set

RUN = 3  # words of a shingle
ALIKE = 0.8  # Jaccard similarity from which two prompts are near-duplicates
MIN_RUNS = 5  # shingles that are not template, below which nothing can be said
WORD_BITS = 21  # three word numbers fit an int64


def duplicates(rows: Set, declared: Declared) -> Iterator[Finding]:
    """Find prompts that an earlier row has, and those that nearly are."""
    first: dict[tuple[str, tuple[str, ...]], Item] = {}
    alone = []
    for item in rows.items:
        # a row of no words is its own text: punctuation alone may differ
        key = item.exchange.system, item.words or (item.exchange.prompt,)
        earlier = first.setdefault(key, item)
        if earlier is item:
            alone.append(item)
            continue
        is_exact = earlier.exchange.prompt == item.exchange.prompt
        how = "same prompt" if is_exact else "same prompt but for case, punctuation or spacing"
        answers = "same" if earlier.exchange.answer == item.exchange.answer else "another"
        detail = f"{how} as row {earlier.number}, {answers} answer"
        yield Finding("duplicate", item.number, detail, item.exchange.prompt)
    yield from _near(alone)


def _near(items: Sequence[Item]) -> Iterator[Finding]:
    """Compare each row with those that share one of its rarest runs, as similar rows must.

    Two sets with Jaccard similarity t share an element among the |x| - ceil(t |x|) + 1 rarest of
    each (Chaudhuri et al. 2006); only those are looked up.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    runs = _runs(items)
    for i, own in enumerate(runs):
        if len(own) < MIN_RUNS:
            continue
        rarest = own[: len(own) - math.ceil(ALIKE * len(own)) + 1].tolist()
        candidates = sorted({j for run in rarest for j in holders[run]})
        for j in candidates:
            if items[j].exchange.system != items[i].exchange.system:
                continue
            other = runs[j]
            shared = len(np.intersect1d(own, other, assume_unique=True))
            alike = shared / (len(own) + len(other) - shared)
            if alike >= ALIKE:
                detail = f"{alike:.0%} of its word runs are those of row {items[j].number}"
                yield Finding("near_duplicate", items[i].number, detail, items[i].exchange.prompt)
                break
        else:
            for run in rarest:
                holders[run].append(i)


def _runs(items: Sequence[Item]) -> list[Any]:
    """Runs of three words of every row, numbered from rare to frequent, template left out."""
    numbers: dict[str, int] = {}
    shingles = []
    for item in items:
        ids = np.fromiter((numbers.setdefault(w, len(numbers)) for w in item.words), np.int64)
        parts = [ids[k : max(len(ids) - RUN + 1 + k, 0)] for k in range(RUN)]
        shingles.append((parts[0] << 2 * WORD_BITS) ^ (parts[1] << WORD_BITS) ^ parts[2])
    ends = np.cumsum([len(each) for each in shingles])
    if not len(ends) or not ends[-1]:
        return [np.empty(0, np.int64) for _ in items]
    unique = [np.unique(each) for each in shingles]
    _, inverse, counts = np.unique(np.concatenate(unique), return_inverse=True, return_counts=True)
    rank = np.empty_like(counts)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    template = min(max(0.02 * len(items), 5), 200)
    found, begin = [], 0
    for each in unique:
        held = inverse[begin : begin + len(each)]
        begin += len(each)
        found.append(np.sort(rank[held[counts[held] <= template]]))
    return found
