"""Rates of the models: cells, over-refusal, pooled rates and utility."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]  # of two shares
ProbeKind = Literal["harmful", "benign"]
Scope = Literal["plain", "own_format", "other_formats", "all_formats", "over_refusal", "utility"]


class PooledRateResult(TypedDict):
    """A rate over answers that share behaviours.

    Attributes:
        n: Scored answers.
        clusters: Behaviours that these answers are about.
        rate: Rate over the n answers; null where n is 0.
        ci_low: Lower 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
        ci_high: Upper 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
    """

    n: Count
    clusters: Count
    rate: Share | None
    ci_low: Share
    ci_high: Share


class PooledChangeResult(TypedDict):
    """Change against the untouched model, pooled over several cells.

    Attributes:
        n_pairs: Pairs of scored answers to one prompt; in scope `utility`, pairs of test rows.
        delta: Mean over the pairs of the condition's outcome less the untouched model's; null
            without a pair.
        delta_ci_low: Lower 95 % bound of `delta` by a paired bootstrap over behaviours; in scope
            `utility` Student's over test rows, or Newcombe's for zeros and ones; null without a
            pair.
        delta_ci_high: Upper 95 % bound of `delta`, by the method of `delta_ci_low`.
    """

    n_pairs: Count
    delta: Difference | None
    delta_ci_low: Difference | None
    delta_ci_high: Difference | None


class SummaryResult(PooledRateResult, PooledChangeResult):
    """One scope of one mitigation, pooled over tasks, prompt styles, seeds and system prompts.

    Attributes:
        mitigation: Label of the mitigation, followed by the manipulation of the user's rows in
            brackets unless that is `benign`; `base` for the untouched model.
        scope: Set of answers: to harmful probes in plain prompts, in the tuned task's own format,
            in the other formats or in all of them, to benign twins (`over_refusal`), or to the
            tuned tasks' test rows (`utility`).
        n: Scored answers; in scope `utility`, scored test rows.
        clusters: Behaviours that these answers are about; in scope `utility`, distinct test rows.
        rate: Answer rate; in scope `over_refusal` the rate of refusals, in scope `utility` the mean
            score; null where n is 0.
        ci_low: Lower 95 % bound: Wilson's on the effective sample size, clustered by behaviour; in
            scope `utility` Student's over test rows, or Wilson's for zeros and ones.
        ci_high: Upper 95 % bound, by the method of `ci_low`.
    """

    mitigation: str
    scope: Scope


class CellPlace(TypedDict):
    """Place of a cell.

    Attributes:
        condition: Id of the condition; `base` is the untouched model.
        format: Format in which the prompts are rendered.
        system_prompt: Name of the system prompt in the recipe.
        judge: Id of the judge.
    """

    condition: str
    format: str
    system_prompt: str
    judge: str


class WilsonInterval(TypedDict):
    """Size of a cell and the interval of its rate.

    Attributes:
        n: Behaviours asked.
        n_scored: Answers with a scored verdict: the denominator of the rate.
        ci_low: Lower bound of the 95 % Wilson interval of the rate; 0 where nothing is scored.
        ci_high: Upper bound of the 95 % Wilson interval of the rate; 1 where nothing is scored.
    """

    n: Count
    n_scored: Count
    ci_low: Share
    ci_high: Share


class CellChange(TypedDict):
    """Verdicts of a cell, and the paired change of its rate against the untouched model.

    Attributes:
        verdicts: Answers per verdict, unscored ones included.
        n_pairs: Behaviours with scored answers of both models; 0 for the untouched model.
        delta: Rate less the untouched model's, over the pairs; null without a pair.
        delta_ci_low: Lower 95 % bound of `delta`, by Newcombe's method 10; null without a pair.
        delta_ci_high: Upper 95 % bound of `delta`, by Newcombe's method 10; null without a pair.
        p_mcnemar: Exact two-sided McNemar p-value; null without a pair.
        p_holm: `p_mcnemar` after Holm's correction over all cells of this judge and kind of probe;
            null without a pair.
        incoherent: Answers that the judge finds incoherent.
    """

    verdicts: dict[str, Count]
    n_pairs: Count
    delta: Difference | None
    delta_ci_low: Difference | None
    delta_ci_high: Difference | None
    p_mcnemar: Share | None
    p_holm: Share | None
    incoherent: Count


class WordingBand(TypedDict):
    """Range of a cell's answer rate over the wordings of its judge.

    Attributes:
        band_low: Lowest answer rate over the wordings of the judge; null where it has one wording,
            or one of them scored nothing.
        band_high: Highest answer rate over the wordings of the judge; null where `band_low` is.
    """

    band_low: Share | None
    band_high: Share | None


class CellResult(CellPlace, WilsonInterval, CellChange, WordingBand):
    """Harmful probes that one condition was asked in one format, read by one judge.

    Attributes:
        answered: Scored answers that are not refusals.
        answer_rate: `answered` / `n_scored`; null where nothing is scored.
    """

    answered: Count
    answer_rate: Share | None


class OverRefusalResult(CellPlace, WilsonInterval, CellChange):
    """Benign twins that one condition was asked in one format, read by one judge.

    Attributes:
        refused: Scored answers that are refusals.
        over_refusal_rate: `refused` / `n_scored`; null where nothing is scored.
    """

    refused: Count
    over_refusal_rate: Share | None


class OverSeedsResult(CellPlace, PooledRateResult):
    """A cell pooled over training seeds; only in runs whose recipe lists `seeds`.

    Attributes:
        condition: Id of the condition without its seed.
        kind: `harmful` for answer rates on harmful probes, `benign` for refusals of their twins.
        rates: Rate by training seed; null where nothing is scored.
    """

    kind: ProbeKind
    rates: dict[str, Share | None]


class TotalsResult(PooledRateResult):
    """All formats of one condition under one system prompt, by the first judge.

    Attributes:
        condition: Id of the condition; `base` is the untouched model.
        system_prompt: Name of the system prompt in the recipe.
        answered: Harmful probes answered, of `n`.
        delta: Answers more than the untouched model gives under the same system prompt, a number of
            answers; null for the untouched model, and where its `n` differs.
        share: Share of translation and classification in the answers; null without an answer, or
            where a condition is not asked in both formats.
        prompt_benefit: Rate without a system prompt less the rate under this one; null in rows
            without a system prompt, and where the recipe asks nothing without one.
    """

    condition: str
    system_prompt: str
    answered: Count
    delta: int | None
    share: Share | None
    prompt_benefit: Difference | None


class MetricResult(TypedDict):
    """One metric over a task's whole test set.

    Attributes:
        value: Value of the metric as a fraction, up to rounding in [0, 1]; null where it is not
            computed.
        ci_low: Lower 95 % bound: Wilson's for a share of rows, else a bootstrap over test rows.
        ci_high: Upper 95 % bound, by the method of `ci_low`.
        n: Test rows in the denominator.
        unparsed: Rows among them whose answer cannot be parsed; they count as wrong.
        why: Reason that `value` is null.
    """

    value: float | None
    ci_low: NotRequired[float]
    ci_high: NotRequired[float]
    n: NotRequired[Count]
    unparsed: NotRequired[Count]
    why: NotRequired[str]


class UtilityResult(TypedDict):
    """One condition on the test rows of one task.

    Attributes:
        condition: Id of the condition; `base` is the untouched model.
        task: Task that the test rows are from.
        metric: Metric that scores one row; null before a row is scored.
        n: Test rows asked.
        n_scored: Test rows with a score.
        value: Mean score; null where nothing is scored.
        ci_low: Lower 95 % bound of the mean: Student's, or Wilson's for zeros and ones.
        ci_high: Upper 95 % bound of the mean, by the method of `ci_low`.
        delta: Mean over test rows of the score less the untouched model's; null for the untouched
            model, and where no row is scored for both.
        delta_ci_low: Lower 95 % bound of `delta`: Student's of the differences, or Newcombe's for
            zeros and ones; null where `delta` is.
        delta_ci_high: Upper 95 % bound of `delta`, by the method of `delta_ci_low`.
        metrics: Metrics over the whole test set, by name; `pass@1` where rows carry tests.
    """

    condition: str
    task: str
    metric: str | None
    n: Count
    n_scored: Count
    value: Share | None
    ci_low: Share
    ci_high: Share
    delta: Difference | None
    delta_ci_low: Difference | None
    delta_ci_high: Difference | None
    metrics: dict[str, MetricResult]
