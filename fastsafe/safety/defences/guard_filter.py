"""Guard filter: a refusal replaces the answer where a guard model flags the prompt or the answer.

Refuse if g(x) > t or g(x, y) > t, where g is the guard's probability of unsafe. Where the guard
gives none, the row is marked as unscreened, and ``on_failure`` decides on its answer. Guards differ
by task format, so a filter is only as good as its audit per format.

Source: the first paper's third question and the guards' own papers (verified that guards fail
across tasks).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fastsafe.errors import UsageError

from ._spec import Defence

# (prompt, answer or None) per row -> probability of unsafe per row, None where the guard failed
UnsafeOdds = Callable[[Sequence[tuple[str, str | None]]], Sequence[float | None]]


class Screened(NamedTuple):
    """The answer of a filtered model to one prompt."""

    answer: str
    outcome: Literal["passed", "prompt_refused", "answer_refused", "unscreened"]


def _apply(
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    guard: UnsafeOdds,
    reads: str,
    threshold: float,
    refusal: str,
    on_failure: str,
) -> list[Screened]:
    """Screen the answers of a model; a row refused by its prompt is not screened again.

    Args:
        prompts: User messages.
        answers: Of the model, in the same order.
        guard: Called at most twice, with all rows that are not refused yet.
        reads: ``"prompt"``, ``"answer"`` or ``"both"``.
        threshold: Probability of unsafe above which a row is refused, in [0, 1].
        refusal: Text of the refusal.
        on_failure: ``"refuse"`` or ``"pass"``: the fate of a row on which the guard failed. In
            either case the row is ``unscreened``, and such rows are reported beside every rate.

    Raises:
        UsageError: An argument is out of range, or the guard gives another number of scores.
    """
    if reads not in ("prompt", "answer", "both") or on_failure not in ("refuse", "pass"):
        raise UsageError(
            f"guard_filter: reads is {reads!r} and on_failure {on_failure!r}, expected 'prompt', "
            "'answer' or 'both', and 'refuse' or 'pass'"
        )
    if len(prompts) != len(answers) or not 0 <= threshold <= 1:
        raise UsageError(
            f"guard_filter: there are {len(prompts)} prompts and {len(answers)} answers, threshold "
            f"is {threshold}; expected as many of both and a number in [0, 1]"
        )
    screened = [Screened(answer, "passed") for answer in answers]
    for part in ("prompt", "answer"):
        open_rows = [i for i, row in enumerate(screened) if row.outcome == "passed"]
        if reads not in (part, "both") or not open_rows:
            continue
        rows = [(prompts[i], answers[i] if part == "answer" else None) for i in open_rows]
        scores = guard(rows)
        if len(scores) != len(rows):
            raise UsageError(
                f"guard_filter: guard gave {len(scores)} scores for {len(rows)} rows, expected "
                "one each"
            )
        for i, score in zip(open_rows, scores, strict=True):
            if score is None:
                answer = refusal if on_failure == "refuse" else answers[i]
                screened[i] = Screened(answer, "unscreened")
            elif score > threshold:
                screened[i] = Screened(
                    refusal, "prompt_refused" if part == "prompt" else "answer_refused"
                )
    return screened


DEFENCE = Defence(
    id="guard_filter",
    stage="serve",
    acts_on="answer",
    about="refuses where a guard flags the prompt or the answer",
    evidence="verified that guards fail across tasks; the rule is common practice",
    needs={"guard": "a callable from rows (prompt, answer or None) to probabilities of unsafe"},
    params={
        "reads": "both",
        "threshold": 0.5,
        "refusal": "I cannot help with that.",
        "on_failure": "refuse",
    },
    apply=_apply,
)
