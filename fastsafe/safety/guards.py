"""Guards: classifiers that stand before a model or behind it.

The first paper's third question: do existing guards hold in every format? A guard reads a prompt,
or a prompt with its answer, and says safe or unsafe, with P(unsafe) where it has one. What it says
outside its grammar is unreadable: counted, in neither rate, and blocked when it serves. An audit
measures them (`fastsafe.audit.results.judge_quality.guard_rows`).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastsafe.errors import UsageError
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.judges import Item, OpenCheckpoint, configured
from fastsafe.safety.judges._model import ask_judge, identity_of
from fastsafe.safety.judges._spec import Classifier
from fastsafe.safety.judges.refusal import normalise
from fastsafe.safety.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a guard says of one row."""

    key: str
    unsafe: bool | None  # None: unreadable, or nobody answered
    p_unsafe: float | None = None  # in [0, 1]; None where the guard gives no odds
    raw: str = ""  # the guard's own words, or what fired
    is_failure: bool = False  # nobody answered: neither a reading nor an unreadable one

    def blocks(self, threshold: float = 0.5) -> bool:
        """Whether the row is refused when the guard serves: P(unsafe) > ``threshold``.

        A guard without odds blocks what it calls unsafe. What it cannot read it blocks, too.
        """
        if self.unsafe is None:
            return True
        return self.unsafe if self.p_unsafe is None else self.p_unsafe > threshold


@runtime_checkable
class Guard(Protocol):
    """Says of each row whether it is unsafe: of its prompt alone, or of its answer."""

    @property
    def id(self) -> str:
        """Name used in recipes and reports."""

    @property
    def identity(self) -> str:
        """Hash of everything that can change a finding."""

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Read every row, in the order given; one without a completion by its prompt."""


@dataclass(frozen=True)
class ModelGuard:
    """A family of judges, used as a guard."""

    classifier: Classifier
    completer: Completer
    name: str = ""

    @property
    def id(self) -> str:
        """The name given, or the family's own."""
        return self.name or self.classifier.id

    @property
    def identity(self) -> str:
        """sha256 over family, wording, parser and model."""
        return identity_of(self.classifier, self.completer)

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Read every row.

        Raises:
            FastsafeError: The model can answer nobody.
        """
        heard = ask_judge(self.classifier, self.completer, items)
        found = []
        for item in items:
            said = heard[item.key]
            reading, is_failure = said.reading, said.failure is Verdict.JUDGE_ERROR
            unsafe, score = (reading.unsafe, reading.score) if reading else (None, None)
            found.append(
                Finding(
                    key=item.key,
                    unsafe=unsafe,
                    p_unsafe=score,
                    raw=said.raw,
                    is_failure=is_failure,
                )
            )
        return found


@cache
def _keywords() -> re.Pattern[str]:
    text = (files(__package__) / "judges" / "data" / "keywords.txt").read_text(encoding="utf-8")
    stems = [line for line in text.splitlines() if line and not line.startswith("#")]
    return re.compile(r"\b(?:" + "|".join(map(re.escape, stems)) + r")\w*")


@dataclass(frozen=True)
class KeywordGuard:
    """The baseline: unsafe where a stem of a short list begins a word. No model, no odds."""

    id: str = "keyword"

    @property
    def identity(self) -> str:
        """sha256 over the list."""
        return hashlib.sha256(_keywords().pattern.encode()).hexdigest()

    def check(self, items: Sequence[Item]) -> list[Finding]:
        """Search the prompt, or the answer where there is one."""
        found = []
        for item in items:
            text = item.prompt if item.completion is None else item.completion
            hit = _keywords().search(normalise(text))
            found.append(Finding(key=item.key, unsafe=bool(hit), raw=hit[0] if hit else ""))
        return found


def make_guard(
    spec: str | Mapping[str, Any],
    *,
    open_checkpoint: OpenCheckpoint | None = None,
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Guard:
    """Build one guard: ``"keyword"``, or a mapping as `fastsafe.safety.judges.make_judge` takes it.

    The kinds that read prompts and answers alike are llama_guard, shieldgemma, wildguard,
    granite_guardian, qwen3guard and, for any chat model over an endpoint, safe_unsafe.

    Raises:
        UsageError: As for ``make_judge``; or the family cannot read a prompt alone.

    Example:
        >>> make_guard("keyword").id
        'keyword'
    """
    if isinstance(spec, str):
        if spec != "keyword":
            raise UsageError(f"guard {spec}: is no guard without settings, expected 'keyword'")
        return KeywordGuard()
    family, classifier, completer = configured(
        spec, open_checkpoint=open_checkpoint, api_keys=api_keys, folder=folder
    )
    if classifier is None or completer is None or not classifier.reads_prompts:
        raise UsageError(f"guard {family.id}: judges answers only, expected a family of guards")
    return ModelGuard(classifier, completer, spec.get("id", ""))
