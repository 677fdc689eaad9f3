"""Guards: classifiers of prompts, or of prompts with their answers, as safe or unsafe.

The first paper's third question is whether existing guards work in every format. A guard gives
P(unsafe) where its model has one. Guards read answers without the model's thoughts, which a
user does not see. A reply outside its grammar is unreadable: it is counted in no
rate, and blocked when the guard serves. An audit measures guards
(`fastsafe.audit.results.judge_quality.guard_rows`).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastsafe.data.thoughts import answer_of
from fastsafe.errors import UsageError, shown
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.judges import Item, OpenCheckpoint, configured
from fastsafe.safety.judges._model import ask_judge, identity_of
from fastsafe.safety.judges._spec import Classifier, answered
from fastsafe.safety.judges.refusal import normalise
from fastsafe.safety.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A guard's classification of one row."""

    key: str
    unsafe: bool | None  # None: unreadable, or no reply
    p_unsafe: float | None = None  # in [0, 1]; None where the guard gives no probability
    raw: str = ""  # the guard's reply, or the keyword that matched
    is_failure: bool = False  # no reply at all, which is not the same as an unreadable one

    def blocks(self, threshold: float = 0.5) -> bool:
        """Return whether the guard blocks the row when it serves: P(unsafe) > ``threshold``.

        Without a probability the classification decides. An unreadable row is blocked.
        """
        if self.unsafe is None:
            return True
        return self.unsafe if self.p_unsafe is None else self.p_unsafe > threshold


@runtime_checkable
class Guard(Protocol):
    """Classifies prompts, or prompts with their answers."""

    @property
    def id(self) -> str:
        """Name used in recipes and reports."""

    @property
    def identity(self) -> str:
        """Hash of everything that can change a finding."""

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Classify every row, in the order given; a row without a completion by its prompt."""


@dataclass(frozen=True)
class ModelGuard:
    """A judge family in the role of a guard."""

    classifier: Classifier
    completer: Completer
    name: str = ""

    @property
    def id(self) -> str:
        """The configured name, or the family's."""
        return self.name or self.classifier.id

    @property
    def address(self) -> str:
        """Address of the endpoint that is asked, "" for a model in this process."""
        return getattr(self.completer, "address", "")

    @property
    def identity(self) -> str:
        """sha256 over family, wording, parser and model."""
        return identity_of(self.classifier, self.completer)

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Classify every row.

        Raises:
            FastsafeError: The model can answer no row at all.
        """
        replies = ask_judge(self.classifier, self.completer, [answered(item) for item in items])
        findings = []
        for item in items:
            reply = replies[item.key]
            findings.append(
                Finding(
                    key=item.key,
                    unsafe=reply.reading.unsafe if reply.reading else None,
                    p_unsafe=reply.reading.score if reply.reading else None,
                    raw=reply.raw,
                    is_failure=reply.failure is Verdict.JUDGE_ERROR,
                )
            )
        return findings


@cache
def _keywords() -> re.Pattern[str]:
    text = (files(__package__) / "judges" / "data" / "keywords.txt").read_text(encoding="utf-8")
    stems = [line for line in text.splitlines() if line and not line.startswith("#")]
    return re.compile(r"\b(?:" + "|".join(map(re.escape, stems)) + r")\w*")


@dataclass(frozen=True)
class KeywordGuard:
    """The baseline: unsafe where a word begins with a stem of a short list; no probability."""

    id: str = "keyword"

    @property
    def identity(self) -> str:
        """sha256 over the list."""
        return hashlib.sha256(_keywords().pattern.encode()).hexdigest()

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Search the answers, or the prompts of rows without one."""
        findings = []
        for item in items:
            text = item.prompt if item.completion is None else answer_of(item.completion)
            match = _keywords().search(normalise(text))
            findings.append(
                Finding(key=item.key, unsafe=bool(match), raw=match[0] if match else "")
            )
        return findings


def make_guard(
    spec: str | Mapping[str, Any],
    *,
    open_checkpoint: OpenCheckpoint | None = None,
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Guard:
    """Build one guard: ``"keyword"``, or a mapping as `fastsafe.safety.judges.make_judge` takes it.

    The families that read both prompts and answers are llama_guard, shieldgemma, wildguard,
    granite_guardian, qwen3guard and, for any chat model, safe_unsafe.

    Raises:
        UsageError: As for ``make_judge``; or the family cannot classify a prompt alone.

    Example:
        >>> make_guard("keyword").id
        'keyword'
    """
    if isinstance(spec, str):
        if spec != "keyword":
            raise UsageError(
                f"guard {shown(spec)}: is no guard without settings, expected 'keyword', or a "
                "mapping such as {kind: llama_guard, checkpoint: ...}"
            )
        return KeywordGuard()
    family, classifier, completer = configured(
        spec, open_checkpoint=open_checkpoint, api_keys=api_keys, folder=folder
    )
    if classifier is None or completer is None or not classifier.reads_prompts:
        raise UsageError(f"guard {family.id}: judges answers only, expected a family of guards")
    return ModelGuard(classifier, completer, spec.get("id", ""))
