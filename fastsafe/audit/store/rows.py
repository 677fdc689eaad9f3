"""Rows that a run writes into its store, and rows that queries return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["harmful", "benign", "utility"]
Target = Literal["prompt", "answer"]  # the text that a guard classifies


@dataclass(frozen=True)
class PlannedRow:
    """One completion to generate. ``key`` hashes everything that determines it."""

    key: str
    condition: str
    kind: Kind
    part: str  # the probe's format, or the task whose utility is measured
    system_prompt: str
    item: str  # behaviour id, or the number of the task's test row
    sample: int
    seed: int  # of the sampler, in [0, 2**63)
    prompt: str  # sha256 of the rendered token ids
    max_tokens: int  # of the completion
    reference: str | None = None  # the expected answer of a utility row
    tests: str | None = None  # assertions that its code must pass
    filtered_from: str | None = None  # key of the row whose completion the guard filters


class CompletionRow(NamedTuple):
    """A completion to insert."""

    key: str
    text: str
    token_ids: Sequence[int]
    finish_reason: str


class JudgementRow(NamedTuple):
    """A judge's verdict to insert."""

    key: str
    judge: str
    identity: str
    verdict: str
    raw: str
    score: float | None
    coherent: bool | None = None


class GuardRow(NamedTuple):
    """A guard's verdict to insert."""

    key: str  # of the prompt, or of the completion's row
    target: Target
    identity: str
    verdict: str
    raw: str
    score: float | None


class AnsweredRow(NamedTuple):
    """A completed row as judges, guards and metrics read it."""

    key: str
    kind: str
    part: str
    prompt: str  # the user's message as rendered in its format
    text: str
    finish_reason: str
    reference: str | None


class PositionStatus(NamedTuple):
    """Whether a planned row has its completion."""

    position: int
    condition: str
    is_done: bool


class ProbeCell(NamedTuple):
    """Probes of one kind that one condition is asked in one format under one system prompt."""

    condition: str
    kind: Kind
    part: str
    system_prompt: str


class ProbeVerdict(NamedTuple):
    """A judge's or guard's verdict on one probe, None where there is none yet."""

    condition: str
    kind: Kind
    part: str
    system_prompt: str
    item: str
    verdict: str | None


class UtilityScore(NamedTuple):
    """Score of one test row; metric and value are None where it is not measured yet."""

    condition: str
    task: str
    item: str
    metric: str | None
    value: float | None
