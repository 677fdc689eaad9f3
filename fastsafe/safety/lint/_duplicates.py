"""Rows that say the same twice: `duplicate` and `near_duplicate` (L2).

A duplicate has the prompt of an earlier row, but for case, punctuation and spacing: all of them
are found. Near-duplicates share seven of ten pairs of neighbouring words, with and without what is
template: all of those are found, so that one changed word in 13 is seen, and a paraphrase is not.
Pairs that more than 2 % of the rows hold (and more than 5; at most 200 rows) count as template: of
a prompt that is nearly repeated in so many rows nothing is said. The same request in another
format is no near-duplicate, nor is a benign twin that is labelled so. The time is linear in rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._rows import Declared, LintFinding, LintRow, Set

ALIKE = 0.7  # Jaccard similarity from which two prompts are near-duplicates
MIN_PAIRS = 5  # pairs of words that are not template, below which nothing can be said
WORD_BITS = 31  # two word numbers fit an int64


def duplicates(rows: Set, declared: Declared) -> Iterator[LintFinding]:
    """Find prompts that an earlier row has, and those that nearly are."""
    first: dict[tuple[str, tuple[str, ...]], LintRow] = {}
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
        yield LintFinding("duplicate", item.number, detail, item.exchange.prompt)
    yield from _near(alone)


def _near(items: Sequence[LintRow]) -> Iterator[LintFinding]:
    """Compare each row with those that share one of its rarest pairs, as similar rows must.

    Two sets with Jaccard similarity t share an element among the |x| - ceil(t |x|) + 1 rarest of
    each (Chaudhuri et al. 2006); only those are looked up.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    pairs, first_of_template = _pairs(items)
    rare = [each[: np.searchsorted(each, first_of_template)] for each in pairs]
    for i, own in enumerate(rare):
        if len(own) < MIN_PAIRS:
            continue
        rarest = own[: len(own) - math.ceil(ALIKE * len(own)) + 1].tolist()
        for j in sorted({j for pair in rarest for j in holders[pair]}):
            alike = _alike(own, rare[j])
            is_comparable = _kind(items[i]) == _kind(items[j])
            if is_comparable and min(alike, _alike(pairs[i], pairs[j])) >= ALIKE:
                detail = f"{alike:.0%} of its pairs of words are those of row {items[j].number}"
                yield LintFinding(
                    "near_duplicate", items[i].number, detail, items[i].exchange.prompt
                )
                break
        else:
            for pair in rarest:
                holders[pair].append(i)


def _kind(item: LintRow) -> tuple[str, str]:
    """What must be the same in rows that are compared."""
    return item.exchange.system, item.label("expected")


def _alike(one: Any, other: Any) -> float:
    """Jaccard similarity of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _pairs(items: Sequence[LintRow]) -> tuple[list[Any], int]:
    """Neighbouring words of every row, numbered from rare to frequent; where template begins."""
    numbers: dict[str, int] = {}
    held = []
    for item in items:
        ids = np.fromiter((numbers.setdefault(w, len(numbers)) for w in item.words), np.int64)
        held.append(np.unique((ids[:-1] << WORD_BITS) | ids[1:]))
    if not held:
        return [], 0
    _, inverse, counts = np.unique(np.concatenate(held), return_inverse=True, return_counts=True)
    rank = np.empty_like(counts)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(each) for each in held])[:-1]
    template = min(max(0.02 * len(items), 5), 200)
    return [np.sort(each) for each in np.split(rank[inverse], ends)], int(
        np.count_nonzero(counts <= template)
    )
