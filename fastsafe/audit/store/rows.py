"""Rows of a run on their way into the store and out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["harmful", "benign", "utility"]
Target = Literal["prompt", "answer"]  # what a guard reads


@dataclass(frozen=True)
class PlannedRow:
    """One answer to be had: who is asked what. ``key`` hashes everything that determines it."""

    key: str
    condition: str
    kind: Kind
    part: str  # the probe's format, or the task whose utility is measured
    system_prompt: str
    item: str  # behaviour id, or the number of the task's test row
    sample: int
    seed: int  # of the sampler, in [0, 2**63)
    prompt: str  # sha256 of the rendered token ids
    max_tokens: int  # most tokens of the answer
    reference: str | None = None  # the expected answer of a utility row
    tests: str | None = None  # assertions that its code must pass
    filtered_from: str | None = None  # key of the row whose answer a guard lets through or not


class Answer(NamedTuple):
    """A completion on its way into the store."""

    key: str
    text: str
    token_ids: Sequence[int]
    finish_reason: str


class Verdict(NamedTuple):
    """A judgement on its way into the store."""

    key: str
    judge: str
    identity: str
    verdict: str
    raw: str
    score: float | None
    coherent: bool | None = None


class Guarded(NamedTuple):
    """What a guard said, on its way into the store."""

    key: str  # of the prompt, or of the answer's row
    target: Target
    identity: str
    verdict: str
    raw: str
    score: float | None


class Asked(NamedTuple):
    """A completed row as a judge or a metric reads it."""

    key: str
    kind: str
    part: str
    prompt: str  # the user's message as rendered in its format
    text: str
    finish_reason: str
    reference: str | None
