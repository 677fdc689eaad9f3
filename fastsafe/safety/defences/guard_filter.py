"""Guard filter: a guard model reads the prompt, the answer or both, and a refusal takes over.

Refuse if g(x) > t or g(x, y) > t, where g is the guard's probability of unsafe. A guard that gives
none is neither safe nor unsafe: its rows are marked, and what is said in its place is a choice.
Guards differ by task format, so a filter is only as good as its audit per format.

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
    """What a filtered model says to one prompt."""

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
    """Screen answers that are there already; a row refused by its prompt is not asked again.

    Args:
        prompts: User messages.
        answers: Of the model, in the same order.
        guard: Called at most twice, with all rows still open.
        reads: ``"prompt"``, ``"answer"`` or ``"both"``.
        threshold: Probability of unsafe above which is refused, in [0, 1].
        refusal: What is said then.
        on_failure: ``"refuse"`` or ``"pass"``: what is said where the guard failed. Either way
            the row is ``unscreened`` and belongs beside every rate.

    Raises:
        UsageError: An argument is out of range, or the guard answers too few rows.
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
    found = [Screened(answer, "passed") for answer in answers]
    for part in ("prompt", "answer"):
        open_rows = [i for i, row in enumerate(found) if row.outcome == "passed"]
        if reads not in (part, "both") or not open_rows:
            continue
        asked = [(prompts[i], answers[i] if part == "answer" else None) for i in open_rows]
        scores = guard(asked)
        if len(scores) != len(asked):
            raise UsageError(
                f"guard_filter: guard gave {len(scores)} scores for {len(asked)} rows, expected "
                "one each"
            )
        for i, score in zip(open_rows, scores, strict=True):
            if score is None:
                said = refusal if on_failure == "refuse" else answers[i]
                found[i] = Screened(said, "unscreened")
            elif score > threshold:
                found[i] = Screened(
                    refusal, "prompt_refused" if part == "prompt" else "answer_refused"
                )
    return found


DEFENCE = Defence(
    id="guard_filter",
    stage="serve",
    acts_on="answer",
    about="refuse if g(prompt) > t or g(prompt, answer) > t",
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
