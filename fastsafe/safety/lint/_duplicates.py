"""Rules on repeated prompts: `duplicate` and `near_duplicate` (L2).

A duplicate has the prompt of an earlier row, apart from case, punctuation and spacing; recall: all.
Near-duplicates share 70 % of their word bigrams (Jaccard), both with and without the bigrams of
templates; recall: all of those, so that one changed word in 13 is found and a paraphrase is not.
Bigrams in more than 2 % of the rows (a bound of at least 5 and at most 200 rows) count as template,
so that prompts which are nearly repeated in so many rows are not reported. The same request in
another format is no near-duplicate, nor is a labelled benign twin. The time is linear in rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._rows import Declared, LintFinding, LintRow, LintSet

ALIKE = 0.7  # Jaccard similarity from which two prompts are near-duplicates
MIN_BIGRAMS = 5  # beside those of templates, for a prompt to be compared
WORD_BITS = 31  # two word numbers fit an int64


def duplicates(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find prompts that repeat an earlier row, exactly or nearly."""
    first: dict[tuple[str, tuple[str, ...]], LintRow] = {}
    distinct = []
    for item in rows.items:
        # prompts without words, of punctuation alone, are compared as text
        key = item.exchange.system, item.words or (item.exchange.prompt,)
        earlier = first.setdefault(key, item)
        if earlier is item:
            distinct.append(item)
            continue
        is_exact = earlier.exchange.prompt == item.exchange.prompt
        how = "same prompt" if is_exact else "same prompt but for case, punctuation or spacing"
        answers = "same" if earlier.exchange.answer == item.exchange.answer else "another"
        detail = f"{how} as row {earlier.number}, {answers} answer"
        yield LintFinding("duplicate", item.number, detail, item.exchange.prompt)
    yield from _near(distinct)


def _near(items: Sequence[LintRow]) -> Iterator[LintFinding]:
    """Compare each row with the earlier rows that share one of its rarest bigrams.

    Two sets with Jaccard similarity t share an element among the |x| - ceil(t |x|) + 1 rarest of
    each (Chaudhuri et al. 2006), so that no other row can be similar.
    """
    rows_with: dict[int, list[int]] = defaultdict(list)
    bigrams, first_of_template = _bigrams(items)
    rare = [row[: np.searchsorted(row, first_of_template)] for row in bigrams]
    for i, row in enumerate(rare):
        if len(row) < MIN_BIGRAMS:
            continue
        rarest = row[: len(row) - math.ceil(ALIKE * len(row)) + 1].tolist()
        for j in sorted({j for bigram in rarest for j in rows_with[bigram]}):
            similarity = _jaccard(row, rare[j])
            is_comparable = _group(items[i]) == _group(items[j])
            if is_comparable and min(similarity, _jaccard(bigrams[i], bigrams[j])) >= ALIKE:
                detail = (
                    f"{similarity:.0%} of its pairs of words are those of row {items[j].number}"
                )
                yield LintFinding(
                    "near_duplicate", items[i].number, detail, items[i].exchange.prompt
                )
                break
        else:
            for bigram in rarest:
                rows_with[bigram].append(i)


def _group(item: LintRow) -> tuple[str, str]:
    """Return the columns that must be equal in rows that are compared."""
    return item.exchange.system, item.label("expected")


def _jaccard(one: Any, other: Any) -> float:
    """Return the Jaccard similarity of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _bigrams(items: Sequence[LintRow]) -> tuple[list[Any], int]:
    """Return the bigrams of every row, as ranks from rare to frequent, and the first template."""
    numbers: dict[str, int] = {}
    bigrams = []
    for item in items:
        ids = np.fromiter((numbers.setdefault(w, len(numbers)) for w in item.words), np.int64)
        bigrams.append(np.unique((ids[:-1] << WORD_BITS) | ids[1:]))
    if not bigrams:
        return [], 0
    _, inverse, counts = np.unique(np.concatenate(bigrams), return_inverse=True, return_counts=True)
    rank = np.empty_like(counts)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(row) for row in bigrams])[:-1]
    template_rows = min(max(0.02 * len(items), 5), 200)
    first_of_template = int(np.count_nonzero(counts <= template_rows))
    return [np.sort(row) for row in np.split(rank[inverse], ends)], first_of_template
