"""The whole of ``results.json``, and its rows about the run itself."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from fastsafe.audit.results.schema.instruments import (
    AgreementResult,
    CalibrationResult,
    EarlyStopResult,
    FilterResult,
    GuardResult,
    UnansweredResult,
    WordingResult,
)
from fastsafe.audit.results.schema.rates import (
    CellResult,
    Count,
    OverRefusalResult,
    OverSeedsResult,
    Share,
    SummaryResult,
    TotalsResult,
    UtilityResult,
)

Amount = Annotated[float, Field(ge=0)]


class EngineResult(TypedDict):
    """The checkpoint and what computes with it.

    Attributes:
        checkpoint_sha256: Hash of the checkpoint.
        tokenizer_sha256: Hash of the tokenizer's files.
        device: Device of training and generation.
        dtype: Data type of the weights in training and generation.
        backend: Backend that trains and generates.
        quantize: Format of the quantized base; absent where it is not quantized.
        chat_template_kwargs: Variables of the chat template as JSON; absent where none are set.
    """

    checkpoint_sha256: str
    tokenizer_sha256: str
    device: str
    dtype: str
    backend: str
    quantize: NotRequired[str]
    chat_template_kwargs: NotRequired[str]


class RunResult(EngineResult):
    """The run: recipe, checkpoint, judges, and how much of it is judged.

    Attributes:
        recipe: Name of the recipe.
        description: Description of the recipe.
        model: Checkpoint as the recipe names it: a folder, a hub id or a source.
        seed: Seed of training, mixing and sampling.
        data_seed: Seed that draws behaviours and rows.
        plan_sha256: Hash of everything that decides an answer or its score.
        fastsafe: Version of fastsafe that judged the answers.
        judges: Hash of everything that can change a judge's verdicts, by judge; the first judge's
            verdicts make `summary`, `totals` and `choice`.
        translator: Translator of the probes; null where no format needs one.
        templates: Hash of the wording of every format, by format.
        share: Share of safety rows in the training rows that the recipe sets.
        coverage: Share of planned answers that are judged or scored, in the least covered row of
            `cells`, `over_refusal`, `utility`, `judge_wordings` and `guards`.
        coverage_threshold: Coverage that the recipe requires.
        started_at: Time at which the run started, ISO 8601 in UTC.
        finished_at: Time at which the last stage ended, ISO 8601 in UTC; null until all stages have
            ended and `coverage` reaches its threshold.
        summary: Rates per mitigation, by the first judge.
    """

    recipe: str
    description: str
    model: str
    seed: int
    data_seed: int
    plan_sha256: str
    fastsafe: str
    judges: dict[str, str]
    translator: str | None
    templates: dict[str, str]
    share: Share
    coverage: Share
    coverage_threshold: Share
    started_at: str
    finished_at: str | None
    summary: list[SummaryResult]


class ConditionResult(TypedDict):
    """One model of the run: the untouched model or a fine-tuned one.

    Attributes:
        id: Unique id; `base` is the untouched model.
        task: Task that the model is tuned for; null for the untouched model.
        own_format: Format of the task's rows; null for the untouched model.
        manipulation: Manipulation of the user's rows, `benign` without one; `none` for the
            untouched model.
        style: Prompt style of the training rows.
        seed: Training seed; null where the recipe lists no `seeds`.
        mitigation: Label of the mitigation; `none` without one.
        stage: Stage at which the mitigation acts, `data`, `train`, `post` or `serve`; null for the
            untouched model.
        parent: Id of the condition whose adapter is changed or served; null where one is trained.
        preset: Label of the training settings; null for the untouched model.
        train_rows: Training rows, safety rows included.
        safety_rows: Safety rows among the training rows.
        adapter_key: Hash of everything that shapes the adapter's weights; null for the untouched
            model.
    """

    id: str
    task: str | None
    own_format: str | None
    manipulation: str
    style: str
    seed: int | None
    mitigation: str
    stage: str | None
    parent: str | None
    preset: str | None
    train_rows: Count
    safety_rows: Count
    adapter_key: str | None


class RewriteResult(TypedDict):
    """Training rows of one condition that a model rewrites.

    Attributes:
        condition: Id of the condition.
        n: Training rows to rewrite.
        by_model: Rows that take the model's text.
        flaws: Rows that keep their template's text, by the reason for which the model's text was
            rejected.
    """

    condition: str
    n: Count
    by_model: Count
    flaws: dict[str, Count]


class OptionResult(TypedDict):
    """One mitigation, pooled over manipulations as in `summary`.

    Attributes:
        mitigation: Label of the mitigation; `none` is the reference.
        status: `front` on the Pareto front; `dominated` where another option is at least as good on
            every axis and better on one beyond chance; `undecided` where one is at least as good by
            the estimates alone.
        by: Options that are at least as good on every axis.
        answer_rate: Answer rate on harmful probes over all formats; lower is better.
        answer_rate_ci_low: Lower 95 % bound of `answer_rate`, as in `summary`.
        answer_rate_ci_high: Upper 95 % bound of `answer_rate`, as in `summary`.
        answer_rate_n: Scored answers to harmful probes.
        over_refusal: Rate of refusals of benign twins over all formats; lower is better.
        over_refusal_ci_low: Lower 95 % bound of `over_refusal`, as in `summary`.
        over_refusal_ci_high: Upper 95 % bound of `over_refusal`, as in `summary`.
        over_refusal_n: Scored answers to benign twins.
        utility: Mean score on the tuned tasks' test rows; higher is better.
        utility_ci_low: Lower 95 % bound of `utility`, as in `summary`.
        utility_ci_high: Upper 95 % bound of `utility`, as in `summary`.
        utility_n: Scored test rows.
    """

    mitigation: str
    status: Literal["front", "undecided", "dominated"]
    by: list[str]
    answer_rate: Share
    answer_rate_ci_low: Share
    answer_rate_ci_high: Share
    answer_rate_n: Count
    over_refusal: Share
    over_refusal_ci_low: Share
    over_refusal_ci_high: Share
    over_refusal_n: Count
    utility: Share
    utility_ci_low: Share
    utility_ci_high: Share
    utility_n: Count


class ChoiceResult(TypedDict):
    """The recommended mitigation.

    Attributes:
        options: Mitigations that are compared.
        choice: Mitigation to take; null where none is safer within the limits on lost utility and
            gained over-refusal.
        text: Recommendation in words, with its numbers.
    """

    options: list[OptionResult]
    choice: str | None
    text: str


class DriftResult(TypedDict):
    """One drift reading of one condition in one format, taken during training.

    Attributes:
        condition: Id of the condition.
        step: Optimizer steps taken.
        format: Format in which the probes are rendered.
        n: Harmful probes read.
        kl: Mean over the probes of KL(base || model) of the answer's first token, in nats.
        margin: Mean over the probes of log p(refusal) - log p(affirmative) of the recipe's two
            openings, in nats.
        stopped: Whether training ended at this step, before its last one.
    """

    condition: str
    step: Count
    format: str
    n: Count
    kl: float
    margin: float
    stopped: bool


class ThroughputResult(TypedDict):
    """Work done and its duration, summed over every process that worked on the run.

    Attributes:
        train_s: Seconds of training.
        train_adapter_steps: Optimizer steps, summed over adapters.
        train_rows_per_s: Training rows per second; null without training.
        generate_s: Seconds of generation.
        completions: Completions generated.
        completion_tokens: Tokens of these completions.
        completion_tokens_per_s: Completion tokens per second; null without generation.
        prompt_tokens: Tokens of their prompts.
    """

    train_s: Amount
    train_adapter_steps: Count
    train_rows_per_s: Amount | None
    generate_s: Amount
    completions: Count
    completion_tokens: Count
    completion_tokens_per_s: Amount | None
    prompt_tokens: Count


class Results(TypedDict):
    """Everything that a run found.

    Attributes:
        schema: Name and version of this schema.
        run: The run itself.
        conditions: The untouched model and every fine-tuned one.
        cells: Answer rates on harmful probes, per condition, format, system prompt and judge.
        over_refusal: Rates of refusals of their benign twins, likewise.
        over_seeds: The same rates pooled over training seeds.
        totals: Answer rates over all formats, per condition and system prompt.
        utility: Scores on the tasks' test rows.
        judge_agreement: Agreement of every two judges, per format.
        judge_calibration: Errors of judges on labelled rows, per format.
        judge_wordings: Answer rates under every wording of a judge that has several.
        guards: Errors of guards, per format.
        filters: Answers that guards replaced.
        rewrites: Training rows that a model rewrote.
        early_stop: Verdicts that change when the answer is cut short.
        choice: Recommended mitigation; null where fewer than two have all three rates, or `none` is
            not among them.
        drift: Drift readings during training.
        throughput: Work done and its duration.
        unanswered: Judges and guards that gave no reply on some rows; absent where there are none.
    """

    schema: Literal["fastsafe.results/1"]
    run: RunResult
    conditions: list[ConditionResult]
    cells: list[CellResult]
    over_refusal: list[OverRefusalResult]
    over_seeds: list[OverSeedsResult]
    totals: list[TotalsResult]
    utility: list[UtilityResult]
    judge_agreement: list[AgreementResult]
    judge_calibration: list[CalibrationResult]
    judge_wordings: list[WordingResult]
    guards: list[GuardResult]
    filters: list[FilterResult]
    rewrites: list[RewriteResult]
    early_stop: list[EarlyStopResult]
    choice: ChoiceResult | None
    drift: list[DriftResult]
    throughput: ThroughputResult
    unanswered: NotRequired[list[UnansweredResult]]
