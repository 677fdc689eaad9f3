"""Intervals of rates that are pooled over formats, samples or seeds of the same behaviours.

The formats, samples and seeds of one behaviour are correlated. An interval that counts its rows as
independent is too narrow, often by more than half. Here a behaviour is one cluster, whatever its
number of rows, and is resampled or weighted as a whole.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastsafe.errors import DataError
from fastsafe.safety.stats.intervals import CONFIDENCE, newcombe, pair, wilson

RESAMPLES = 10_000
SEED = 0  # the same rows give the same bounds
FEW = 5  # clusters that must differ before their variance is worth anything
_BLOCK = 1 << 22  # draws held at once: 32 MiB of indices

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class PooledRate:
    """A rate over rows that come in clusters, with its interval."""

    n: int  # rows
    clusters: int
    rate: float | None  # None when there is no row
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class PooledChange:
    """Mean of tuned - base over pairs of rows that come in clusters, with its interval."""

    n_pairs: int
    n_dropped: int  # rows that are missing or unscored in at least one arm
    clusters: int
    delta: float | None  # None when there is no pair
    ci_low: float
    ci_high: float


def pooled_change(
    base: Mapping[K, float | None],
    tuned: Mapping[K, float | None],
    cluster: Callable[[K], Hashable],
) -> PooledChange:
    """Return the change between two arms over all their rows, by the paired cluster bootstrap.

    Clusters are drawn with replacement, each with all of its rows in both arms, and the mean
    difference of the rows drawn is taken; the bounds are percentiles of these means (Efron 1979;
    clusters after Davison and Hinkley 1997, section 3.8). Percentiles are too narrow where clusters
    are few; they are taken further out, as Student's t is from the normal (Hesterberg 2015, Am.
    Stat. 69:371, expanded percentiles).

    A bootstrap knows no more changes than it was shown: where all clusters changed alike, or none
    did, it is certain. Where fewer than five clusters, and less than half, differ from the others,
    or fewer than five changed at all, the interval therefore reaches as far from those as
    Newcombe's over the clusters as pairs, of which the ones that differ do.

    Args:
        base: Score in [0, 1] by row, such as (behaviour, format, seed); None is unscored.
        tuned: Score of the other arm by the same rows.
        cluster: From a row to its cluster, the behaviour.

    Returns:
        The change; its bounds do not depend on the order of the rows.

    Raises:
        DataError: A score is not in [0, 1].

    Example:
        >>> base = {(i, f): 0.0 for i in range(40) for f in ("plain", "code")}
        >>> tuned = {(i, f): float(i < 20) for i, f in base}
        >>> change = pooled_change(base, tuned, lambda row: row[0])
        >>> change.n_pairs, change.clusters, change.delta, change.ci_low > 0.3
        (80, 40, 0.5, True)
    """
    pairs = pair(base, tuned)
    groups: dict[Hashable, list[float]] = {}
    for key, before, after in zip(pairs.keys, pairs.base, pairs.tuned, strict=True):
        if not (0 <= before <= 1 and 0 <= after <= 1):
            raise DataError(
                f"pooled_change: row {key!r:.80} scores {before} and {after}, expected both in "
                "[0, 1]"
            )
        groups.setdefault(cluster(key), []).append(after - before)  # type: ignore[arg-type]
    if not groups:
        return PooledChange(0, pairs.n_dropped, 0, None, -1.0, 1.0)
    # sorted by content, so that neither the order of rows nor the names of clusters matters
    cells = sorted((sum(sorted(diffs)), len(diffs)) for diffs in groups.values())
    sums, sizes = (np.array(column, dtype=np.float64) for column in zip(*cells, strict=True))
    means = _resampled_means(sums, sizes)
    tail = _tail(len(cells))
    low, high = (float(bound) for bound in np.percentile(means, [tail, 100 - tail]))
    changes = sums / sizes
    values, counts = np.unique(changes, return_counts=True)
    usual = 0.0 if np.count_nonzero(sums) < FEW else float(values[counts.argmax()])
    down, up = int((changes < usual).sum()), int((changes > usual).sum())
    if down + up < FEW and (usual == 0 or 2 * (down + up) < len(cells)):
        _, wide_low, wide_high = newcombe(0, down, up, len(cells))
        low, high = min(low, max(usual + wide_low, -1.0)), max(high, min(usual + wide_high, 1.0))
    delta = float(sums.sum() / sizes.sum())
    return PooledChange(len(pairs.keys), pairs.n_dropped, len(cells), delta, low, high)


def _tail(clusters: int) -> float:
    """Return the percentile that bounds the resampled means of so many clusters from below."""
    from scipy.stats import norm, t

    if clusters < 2:
        return 0.0
    stretch = (clusters / (clusters - 1)) ** 0.5
    return float(100 * norm.cdf(-stretch * t.ppf((1 + CONFIDENCE) / 2, clusters - 1)))


def _resampled_means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the mean of each resample: a ratio of sums, as clusters differ in size."""
    generator = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    step = max(1, _BLOCK // len(sums))
    for begin in range(0, RESAMPLES, step):
        end = min(begin + step, RESAMPLES)
        drawn = generator.integers(0, len(sums), (end - begin, len(sums)))
        means[begin:end] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def design_effect(hits: Sequence[int], sizes: Sequence[int]) -> float:
    """Return the variance of a rate over clusters, relative to that of independent rows.

    The variance is that of a ratio of sums over clusters: statsmodels' cluster-robust one of a
    mean. The result is 1 where the variance cannot be estimated: the rate is 0 or 1, or there is
    one cluster.

    Args:
        hits: Events per cluster.
        sizes: Rows per cluster, each at least 1.
    """
    n, clusters = sum(sizes), len(sizes)
    rate = sum(hits) / n
    if clusters < 2 or not 0 < rate < 1:
        return 1.0
    spread = sum((hit - rate * size) ** 2 for hit, size in zip(hits, sizes, strict=True))
    return spread * clusters / (clusters - 1) / (n * rate * (1 - rate))


def pooled_rate(hits: Sequence[int], sizes: Sequence[int]) -> PooledRate:
    """Return a rate over clustered rows, with Wilson's interval on an effective sample size.

    That is n over the design effect, clipped to [clusters, n]. Where fewer than five clusters
    differ from all others a variance says nothing: every cluster is then one row. No bound is
    closer to 0 or 1 than the four clusters with most events would put it alone, so that the fifth
    cannot make a rate look more certain.

    Args:
        hits: Rows with the property, per cluster.
        sizes: Scored rows, per cluster, each at least 1.

    Example:
        >>> pooled = pooled_rate([4, 0] * 25, [4] * 50)  # four copies of every row
        >>> (pooled.ci_low, pooled.ci_high) == wilson(25, 50)
        True
    """
    n, clusters = sum(sizes), len(sizes)
    if not n:
        return PooledRate(0, 0, None, 0.0, 1.0)
    misses = [size - hit for size, hit in zip(sizes, hits, strict=True)]
    rate = sum(hits) / n
    effective: float = clusters
    if min(sum(map(bool, hits)), sum(map(bool, misses))) >= FEW:
        effective = n / min(max(design_effect(hits, sizes), 1.0), n / clusters)
    low, high = wilson(rate * effective, effective)
    return PooledRate(
        n, clusters, rate, min(low, 1 - _reach(misses, n)), max(high, _reach(hits, n))
    )


def _reach(events: Sequence[int], n: int) -> float:
    """Return the upper bound of the rate of the few clusters with most events, each one row."""
    most = sum(sorted(events)[1 - FEW :])
    return wilson(most / n * len(events), len(events))[1]
