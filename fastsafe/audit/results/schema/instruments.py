"""How far judges, guards and cut answers can be trusted."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from fastsafe.audit.results.schema.rates import CellPlace, Count, Share, WilsonInterval
from fastsafe.audit.store.rows import Kind, Target

Kappa = Annotated[float, Field(le=1)]
ReadBy = Literal["judge", "guard", "filter"]


class AgreementResult(TypedDict):
    """Two judges in one format: whether they agree that an answer is, or is not, a refusal.

    Attributes:
        judge_a: Id of one judge.
        judge_b: Id of the other judge.
        format: Format in which the prompts are rendered.
        n: Answers of all conditions that both judges score.
        agreement: Share of these answers on which the judges agree.
        ci_low: Lower 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
        ci_high: Upper 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
        kappa: Cohen's kappa; null where one label alone makes chance agreement certain.
    """

    judge_a: str
    judge_b: str
    format: str
    n: Count
    agreement: Share | None
    ci_low: Share
    ci_high: Share
    kappa: Kappa | None


class RateResult(TypedDict):
    """A rate with its counts.

    Attributes:
        n: Rows.
        n_scored: Rows with a readable verdict: the denominator of the rate.
        count: Rows that the rate counts: its numerator.
        rate: `count` / `n_scored`; null where nothing is scored.
        ci_low: Lower 95 % bound: Wilson's; clustered by behaviour where `clusters` is given.
        ci_high: Upper 95 % bound, by the method of `ci_low`.
    """

    n: Count
    n_scored: Count
    count: Count
    rate: Share | None
    ci_low: Share
    ci_high: Share


class CalibrationResult(TypedDict):
    """One judge on the shipped labelled rows of one format.

    Attributes:
        judge: Id of the judge.
        format: Format in which the prompts are rendered.
        n: Labelled rows.
        n_scored: Labelled rows with a scored verdict.
        kappa: Cohen's kappa of verdicts and labels; null where it is undefined.
        false_refusal: Labelled answers that the judge calls refusals.
        false_compliance: Labelled refusals that the judge calls answers.
        missed_incoherence: Labelled noise and silence that the judge calls answers or refusals.
    """

    judge: str
    format: str
    n: Count
    n_scored: Count
    kappa: Kappa | None
    false_refusal: RateResult
    false_compliance: RateResult
    missed_incoherence: RateResult


class WordingResult(CellPlace, WilsonInterval):
    """Harmful probes of one cell, read by one wording of its judge.

    Attributes:
        wording: Name of the wording.
        answered: Scored answers that are not refusals.
        answer_rate: `answered` / `n_scored`; null where nothing is scored.
    """

    wording: str
    answered: Count
    answer_rate: Share | None


class GuardRateResult(RateResult):
    """A rate of a guard.

    Attributes:
        clusters: Behaviours that the scored rows are about.
    """

    clusters: Count


class GuardResult(TypedDict):
    """One guard on the prompts, or on the answers of all conditions, in one format.

    Attributes:
        guard: Id of the guard.
        target: Text that the guard classifies: `prompt` or `answer`.
        format: Format in which the prompts are rendered.
        recall: Share called unsafe of harmful probes, or of answers that the first judge calls
            harmful; null where there are none.
        false_positives: Share called unsafe of benign twins, or of their answers; null where there
            are none.
        refusals_flagged: Share called unsafe of refusals of harmful probes; null where there are
            none.
        n: Prompts or answers that one of the three rates counts.
        n_unread: Rows among them without a verdict of the guard yet.
        n_unreadable: Rows among them for which the guard's reply cannot be parsed.
    """

    guard: str
    target: Target
    format: str
    recall: GuardRateResult | None
    false_positives: GuardRateResult | None
    refusals_flagged: GuardRateResult | None
    n: Count
    n_unread: Count
    n_unreadable: Count


class FilterResult(TypedDict):
    """Answers of one condition whose mitigation is a guard that filters them.

    Attributes:
        condition: Id of the condition.
        kind: Rows that are answered: `harmful` probes, `benign` twins or `utility` test rows.
        n: Answers.
        prompt_refused: Answers replaced by a refusal because of the prompt.
        answer_refused: Answers replaced by a refusal because of the answer.
        unscreened: Answers for which the guard's reply cannot be parsed; `on_failure` of the
            mitigation decides whether a refusal replaces them.
    """

    condition: str
    kind: Kind
    n: Count
    prompt_refused: Count
    answer_refused: Count
    unscreened: Count


class EarlyStopResult(TypedDict):
    """One judge on probes that were answered both cut short and in full.

    Attributes:
        judge: Id of the judge.
        n: Answers that the judge scores both ways.
        flips: Answers whose verdict differs between the two.
        rate: `flips` / `n`.
        ci_low: Lower 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
        ci_high: Upper 95 % bound: Wilson's on the effective sample size, clustered by behaviour.
    """

    judge: str
    n: Count
    flips: Count
    rate: Share | None
    ci_low: Share
    ci_high: Share


class UnansweredResult(TypedDict):
    """Rows on which one judge or guard gave no reply when it was last asked.

    Attributes:
        read_by: `judge`, `guard`, or `filter` for the guard of a mitigation.
        name: Id of the judge or guard, or label of the mitigation.
        address: Address and model of its endpoint; empty where it runs in this process.
        n: Rows that it was asked about.
        failed: Rows among them without a reply, which are asked about again.
        cause: The most common cause.
    """

    read_by: ReadBy
    name: str
    address: str
    n: Count
    failed: Count
    cause: str
