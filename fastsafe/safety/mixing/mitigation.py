"""Mitigations by data: safety rows mixed into a user's fine-tuning rows.

The first paper's finding: the style of safety rows decides which prompts they repair. Refusals of
plain questions repair plain questions alone; to repair a task, they must be written as its input.

Sources: SafeInstruct (here ``plain``) Bianchi et al. 2024, arXiv:2309.07875; the longest examples
after Zhao et al. 2024, arXiv:2402.04833; Multi-Task (``multi_task``) Jan et al. 2024,
arXiv:2409.15361; Paraphrase and Mixed Eiras et al. 2024, arXiv:2406.10288.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastsafe.data.conversation import Row
from fastsafe.data.exchange import exchange_of
from fastsafe.data.mixture import interleave, num_rows_for, num_safety_rows, safety_amount
from fastsafe.errors import UsageError
from fastsafe.safety.mixing.dresser import Dresser, Translate
from fastsafe.safety.mixing.learned_style import learn, styles
from fastsafe.safety.mixing.rewrite_checks import Rewrite
from fastsafe.safety.plugins import collect
from fastsafe.safety.texts import chosen

SafetyRows = Callable[[str, int, int], Sequence[Row]]  # (format, n, seed) -> n rows
Formats = Callable[[str, Sequence[str]], Sequence[str]]  # (task's format, all) -> formats used
Dress = Callable[[Row, int], dict[str, Any]]  # (safety row, its number) -> the row, restyled
Restyle = Callable[[Sequence[Row], Translate | None], Dress]  # user rows -> function that restyles
CountTokens = Callable[[Row], int]

NUM_EXAMPLES = 4  # user prompts shown to a rewriting model


@dataclass(frozen=True, kw_only=True)
class Mitigation:
    """A choice of safety rows: their formats, their number per row used, and their style."""

    id: str
    formats: Formats  # returns no formats to mix nothing in
    about: str = ""  # one line for lists; "" names the formats
    drawn_per_row: int = 1  # safety rows drawn for each one used; the longest are used
    restyle: Restyle | None = None  # None leaves safety rows as they are

    def mix(
        self,
        rows: Sequence[Row],
        safety_rows: SafetyRows,
        *,
        share: float,
        task_format: str,
        all_formats: Sequence[str],
        seed: int,
        count_tokens: CountTokens | None = None,
        repeat: bool = False,
        translate: Translate | None = None,
    ) -> list[dict[str, Any]]:
        """Return the training rows of one condition.

        Args:
            rows: The user's rows; not modified.
            safety_rows: Called per format used as ``(format, n, seed)``; returns rows, at least
                one, that refuse harmful requests in that format. Where tokens are counted, a longer
                list must begin with the shorter one.
            share: Fraction of safety rows, or of their tokens, in the result, in [0, 1).
            task_format: Id of the format of the user's rows.
            all_formats: Ids of all formats, for mitigations that use them all.
            seed: Of the safety rows and of the order.
            count_tokens: Returns the positive number of tokens of a row; makes ``share`` a share
                of tokens instead of rows.
            repeat: Whether safety rows are repeated where there are too few; otherwise that is an
                error.
            translate: Translates a request into the language of the user's requests, where a
                mitigation restyles rows; None leaves its language.

        Returns:
            Every user row once and round(share * n / (1 - share)) safety rows, shuffled; by tokens,
            the number of rows whose tokens come nearest. The safety rows, or their tokens, are
            spread evenly over the formats: rows per format differ by at most one. Each row has its
            origin in columns: ``source`` ("user" or "safety"), ``source_row`` (its number there, or
            among the rows drawn in its format), ``safety_format`` (None for a user's row) and
            ``mitigation``.

        Raises:
            UsageError: ``share`` is not in [0, 1), or ``safety_rows`` gives too few rows.
            DataError: A row cannot be read where its text is needed.
        """
        formats = self.formats(task_format, all_formats)
        dress = self.restyle(rows, translate) if self.restyle and rows else None
        draw = _Draw(self, safety_rows, dress, seed, repeat)
        pool: list[dict[str, Any]] = []
        if formats and count_tokens is None:
            total = num_safety_rows(len(rows), share)
            for i, format in enumerate(formats):
                pool += draw.rows(format, total // len(formats) + (i < total % len(formats)))
        elif formats and count_tokens is not None:
            tokens = safety_amount(sum(map(count_tokens, rows)), share)
            drawn_tokens = 0
            for i, format in enumerate(formats, start=1):
                remaining = tokens * i / len(formats) - drawn_tokens
                drawn = draw.rows_for_tokens(format, remaining, count_tokens)
                drawn_tokens += sum(map(count_tokens, drawn))
                pool += drawn
        numbered = [{**row, "source_row": i, "safety_format": None} for i, row in enumerate(rows)]
        mixed = interleave(numbered, pool, seed=seed)
        return [{**row, "mitigation": self.id} for row in mixed]


class _Draw:
    """The safety rows of one mixture, drawn and restyled by its mitigation."""

    def __init__(
        self,
        mitigation: Mitigation,
        safety_rows: SafetyRows,
        dress: Dress | None,
        seed: int,
        repeat: bool,
    ) -> None:
        self.mitigation = mitigation
        self.safety_rows = safety_rows
        self.seed = seed
        self.repeat = repeat
        self.dress = dress

    def rows(self, format: str, n: int) -> list[dict[str, Any]]:
        """Draw exactly ``n`` rows of a format."""
        drawn = self._drawn(format, n) if n else []
        if len(drawn) < n and not (self.repeat and drawn):
            raise UsageError(
                f"mitigation {self.mitigation.id}: safety rows in format {format} are "
                f"{len(drawn)}, expected {n}; supply more"
            )
        return [drawn[i % len(drawn)] for i in range(n)]

    def rows_for_tokens(
        self, format: str, tokens: float, count_tokens: CountTokens
    ) -> list[dict[str, Any]]:
        """Draw the rows whose tokens come nearest to ``tokens``."""
        n, drawn, lengths = 0, list[dict[str, Any]](), list[int]()
        while sum(lengths) < tokens:
            n = max(1, 2 * n)
            drawn = self._drawn(format, n)
            if len(drawn) < n and sum(map(count_tokens, drawn)) < tokens:
                drawn = self.rows(format, n)  # repeats them, or says that they are too few
            lengths = [count_tokens(row) for row in drawn]
            if not all(lengths):
                raise UsageError(
                    f"mitigation {self.mitigation.id}: a safety row in format {format} has 0 "
                    "tokens, expected one or more; drop empty rows"
                )
        return drawn[: num_rows_for(lengths, tokens)]

    def _drawn(self, format: str, n: int) -> list[dict[str, Any]]:
        drawn = self.safety_rows(format, n * self.mitigation.drawn_per_row, self.seed)
        labelled: list[dict[str, Any]] = [
            {"source_row": i, "safety_format": format, **row} for i, row in enumerate(drawn)
        ]
        if self.mitigation.drawn_per_row > 1:
            labelled.sort(key=_length, reverse=True)
        labelled = labelled[:n]
        if self.dress is None:
            return labelled
        return [
            {"source_row": row["source_row"], **self.dress(row, i)}
            for i, row in enumerate(labelled)
        ]


def paraphrasing(
    *, abstain: bool = False, rewrite: Rewrite | None = None, known_styles: bool = False
) -> Mitigation:
    """Return the mitigation that rewrites plain safety rows in the user's own style.

    Args:
        abstain: Add an option that refuses where the style has options, and choose it.
        rewrite: A model that rewords the requests; a row keeps the template, and says so, where
            its wording fails the checks of `fastsafe.safety.mixing.rewrite_checks`.
        known_styles: Use every shipped prompting style beside the user's, evenly, as a provider
            can who does not know how the user will prompt.
    """

    def restyle(user_rows: Sequence[Row], translate: Translate | None) -> Dress:
        learned = learn(user_rows)
        examples: list[str] = []
        if rewrite:
            pool = [exchange_of(row, f"user row {i}").prompt for i, row in enumerate(user_rows)]
            examples = [chosen(pool, f"example {i}") for i in range(NUM_EXAMPLES)]
        dressers = [
            Dresser(
                style=learned,
                abstain=abstain,
                translate=translate,
                rewrite=rewrite,
                examples=examples,
            )
        ]
        if known_styles:
            shipped = (replace(style, kind=learned.kind) for style in styles())
            dressers += [Dresser(style=style, abstain=abstain) for style in shipped]

        def dress(row: Row, i: int) -> dict[str, Any]:
            dresser = dressers[i % len(dressers)]
            return {**dresser(row, f"safety row {i}"), "safety_format": dresser.style.id}

        return dress

    return Mitigation(
        id="mixed" if known_styles else "paraphrase",
        formats=lambda task_format, every: ("plain",),
        about="safety rows dressed in the user's own style"
        + (" and in known prompting styles, for when it may change" if known_styles else ""),
        restyle=restyle,
    )


def _length(row: Row) -> int:
    return sum(map(len, exchange_of(row, "safety row")))


NONE = Mitigation(id="none", formats=lambda task_format, every: ())
PLAIN = Mitigation(id="plain", formats=lambda task_format, every: ("plain",))
TASK_STYLED = Mitigation(id="task_styled", formats=lambda task_format, every: (task_format,))
MULTI_TASK = Mitigation(id="multi_task", formats=lambda task_format, every: tuple(every))
LONGEST = Mitigation(
    id="longest",
    formats=lambda task_format, every: ("plain",),
    about="the longest plain safety rows, of ten times as many",
    drawn_per_row=10,
)
PARAPHRASE = paraphrasing()
MIXED = paraphrasing(known_styles=True)
MODEL_WORDED = (PARAPHRASE.id, MIXED.id)  # mitigations whose requests a model may reword


def mitigations() -> dict[str, Mitigation]:
    """Return every mitigation by id: those of this file, then those of entry points.

    ``plain`` is SafeInstruct: safety rows as plain questions.

    Raises:
        UsageError: Two mitigations have one id, or an entry point names something else.

    Example:
        >>> list(mitigations())
        ['none', 'plain', 'task_styled', 'multi_task', 'longest', 'paraphrase', 'mixed']
    """
    shipped = (NONE, PLAIN, TASK_STYLED, MULTI_TASK, LONGEST, PARAPHRASE, MIXED)
    return collect(shipped, "fastsafe.mitigations", Mitigation)
