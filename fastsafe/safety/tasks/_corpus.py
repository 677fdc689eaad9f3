"""Metrics over a whole test set, each with a 95 % interval.

Accuracies have Wilson's interval. Metrics that are no share of rows (BLEU, F1, a mean of ROUGE)
have a bootstrap interval over rows: each is a function of a sum over rows, so that a resample is
one weighted sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastsafe.data.thoughts import answer_of
from fastsafe.errors import DataError, UsageError
from fastsafe.safety.stats.intervals import wilson

from ._metrics import normalised
from ._spec import Measured, Metric

RESAMPLES = 1000
SEED = 0  # of the resampling: the same answers always give the same interval

Pairs = list[tuple[str, str]]
Extract = Callable[[str], str | None]


def share(hits: Sequence[bool], unparsed: int = 0) -> Measured:
    """Return the share of rows that are hits, with Wilson's interval."""
    low, high = wilson(sum(hits), len(hits))
    value = sum(hits) / len(hits) if hits else None
    return Measured(value, low, high, len(hits), unparsed)


def accuracy(extract: Extract) -> Metric:
    """Return a metric: the share of rows whose extracted answer equals the reference's.

    An answer that cannot be extracted stays in the denominator, counts as wrong, and is reported as
    unparsed.

    Args:
        extract: Text -> answer, None without one; must succeed on every reference.
    """

    def measure(pairs: Pairs) -> Measured:
        answers = _extracted(pairs, extract)
        return share([a == b for a, b in answers], sum(a is None for a, _ in answers))

    return measure


def macro_f1(extract: Extract) -> Metric:
    """Return a metric: the unweighted mean of F1 over the references' classes.

    An answer that cannot be extracted is a miss of its row's class alone. A resample without rows
    of a class leaves that class out of its mean.
    """

    def measure(pairs: Pairs) -> Measured:
        import numpy as np

        answers = _extracted(pairs, extract)
        classes = sorted({reference for _, reference in answers})
        # per row and class: a true positive, an answer, a reference
        hits = np.array([[a == b == name for name in classes] for a, b in answers], float)
        given = np.array([[a == name for name in classes] for a, _ in answers], float)
        true = np.array([[b == name for name in classes] for _, b in answers], float)

        def mean_f1(sums: Any) -> float:
            tp, n_given, n_true = np.split(sums, 3)
            present = n_true > 0
            return float((2 * tp[present] / (n_given + n_true)[present]).mean())

        stats = np.concatenate([hits, given, true], axis=1) if answers else hits
        return resampled(stats, mean_f1, sum(a is None for a, _ in answers))

    return measure


def exact(pairs: Pairs) -> Measured:
    """Return the share of rows whose text equals the reference after `normalised`."""
    return share(
        [normalised(completion) == normalised(reference) for completion, reference in pairs]
    )


def bleu(pairs: Pairs) -> Measured:
    """Return sacrebleu's corpus BLEU (Papineni et al. 2002; 13a tokens), as a fraction."""
    return _sacrebleu("BLEU", pairs)


def chrf(pairs: Pairs) -> Measured:
    """Return sacrebleu's corpus chrF (Popovic 2015; character 6-grams, beta 2), as a fraction."""
    return _sacrebleu("CHRF", pairs)


def rouge(kind: str) -> Metric:
    """Return a metric: the mean F-measure of one ROUGE (Lin 2004) by rouge-score, stemmed.

    Args:
        kind: ``"rouge1"``, ``"rouge2"`` or ``"rougeL"``.
    """

    def measure(pairs: Pairs) -> Measured:
        import numpy as np

        scorer = _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
        scores = [
            scorer.score(reference, answer_of(text))[kind].fmeasure for text, reference in pairs
        ]
        return resampled(np.array([[score, 1.0] for score in scores]), lambda s: float(s[0] / s[1]))

    return measure


def resampled(stats: Any, compute: Callable[[Any], float], unparsed: int = 0) -> Measured:
    """Return a metric of sums over rows with its percentile bootstrap interval.

    Args:
        stats: [n, m] contribution of each row to the sums.
        compute: Sums [m] -> value in [0, 1].
        unparsed: Rows whose answer could not be extracted.

    Returns:
        The value on all rows, with the interval of `RESAMPLES` draws of n rows; None and (0, 1)
        without rows.
    """
    import numpy as np

    n = len(stats)
    if not n:
        return Measured(None, 0.0, 1.0, 0)
    times = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    values = [compute(sums) for sums in times @ stats]
    low, high = np.quantile(values, [0.025, 0.975])
    return Measured(compute(stats.sum(0)), float(low), float(high), n, unparsed)


def _extracted(pairs: Pairs, extract: Extract) -> list[tuple[str | None, str]]:
    """Return the answers of completions and references.

    Raises:
        DataError: A reference has no answer.
    """
    answers = []
    for completion, reference in pairs:
        if (true := extract(reference)) is None:
            raise DataError(
                f"metric: reference is {reference[:40]!r}, expected one that {extract.__name__} "
                "reads"
            )
        answers.append((extract(completion), true))
    return answers


def _sacrebleu(kind: str, pairs: Pairs) -> Measured:
    import numpy as np

    metric = getattr(_library("sacrebleu.metrics"), kind)()
    if not pairs:
        return Measured(None, 0.0, 1.0, 0)
    texts = [answer_of(text) for text, _ in pairs]
    references = [reference for _, reference in pairs]
    # Its public bootstrap gives no value without a second pass, and no quantiles. A test holds
    # these two against `corpus_score`.
    stats = metric._extract_corpus_statistics(texts, [references])
    compute = metric._compute_score_from_stats
    return resampled(
        np.array(stats, float), lambda sums: float(compute([int(x) for x in sums]).score) / 100
    )


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UsageError(
            f"metric: {package} is not installed; run `pip install '.[metrics]'` in the "
            "clone of fastsafe"
        ) from error
