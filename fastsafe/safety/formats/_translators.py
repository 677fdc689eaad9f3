"""Translators: who puts a behaviour into the language of the translation format.

Which translator it was belongs in a run's record: another one makes other prompts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol, runtime_checkable

from fastsafe.errors import DataError
from fastsafe.safety.files import file_sha256, read_rows

Complete = Callable[[Sequence[Mapping[str, str]]], str]  # messages -> text of one model


@runtime_checkable
class Translator(Protocol):
    """A `Translate` that says who it is."""

    @property
    def translator_id(self) -> str:
        """Name and hash of what decides its translations."""

    def __call__(self, text: str) -> str:
        """Return the translation of one text.

        Raises:
            DataError: There is none.
        """


@dataclass(frozen=True)
class Dictionary:
    """Translations by rule, as the organism's world has them."""

    translator_id: str
    translate: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """Return what the rule gives."""
        return self.translate(text)


@dataclass(frozen=True)
class Pairs:
    """Translations that were written down, text by text."""

    translator_id: str
    translations: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "Pairs":
        """Read translations from a file.

        Args:
            path: As `read_rows`, with columns ``text`` and ``translation``.

        Raises:
            DataError: The file is malformed, a text is empty, or one has two translations.
        """
        path = Path(path)
        found: dict[str, str] = {}
        for number, row in read_rows(path):
            text, translation = (str(row.get(c, "")).strip() for c in ("text", "translation"))
            if not text or not translation:
                raise DataError(
                    f"{path}: row {number}: columns are {', '.join(map(str, row))}, expected "
                    "text and translation, both with words in them"
                )
            if found.setdefault(text, translation) != translation:
                raise DataError(f"{path}: row {number}: {text!r} has two translations; keep one")
        return cls(f"pairs:{file_sha256(path)[:16]}", found)

    def __call__(self, text: str) -> str:
        """Return the translation that was written down.

        Raises:
            DataError: There is none for this text.
        """
        if text not in self.translations:
            raise DataError(
                f"translator {self.translator_id}: no translation of {text!r}, expected one in the "
                "file; add a row or use another translator"
            )
        return self.translations[text]


@dataclass(frozen=True)
class Completed:
    """Translations by a model, the audited one or another, each asked for once.

    A model may answer otherwise than with a translation: an empty reply, the text itself and an
    opening refusal are errors; what else may be wrong with a translation nothing here can see.
    """

    identity: str  # of the model and its decoding, as its owner names it
    complete: Complete = field(repr=False)
    language: str = "French"
    _known: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def instruction(self) -> str:
        """What the model is told before the text."""
        return f"Translate the text into {self.language}. Reply with the translation alone."

    @property
    def translator_id(self) -> str:
        """The model's identity and the hash of the instruction."""
        return f"{self.identity}:{hashlib.sha256(self.instruction.encode()).hexdigest()[:16]}"

    def __call__(self, text: str) -> str:
        """Return the model's translation.

        Raises:
            DataError: The reply is empty, the text itself, or a refusal.
        """
        if text not in self._known:
            from fastsafe.safety.judges.refusal import JUDGE
            from fastsafe.safety.verdict import Verdict

            messages = [{"role": "user", "content": f"{self.instruction}\n\n{text}"}]
            reply = self.complete(messages).strip()
            refused = JUDGE.judge("", reply, True).verdict is Verdict.REFUSED
            if not reply or reply == text or refused:
                got = "a refusal" if refused else "no translation"
                raise DataError(
                    f"translator {self.translator_id}: {text!r} got {got}; supply a file of pairs"
                )
            self._known[text] = reply
        return self._known[text]


def seed_translator() -> Pairs:
    """Return the French translations of `seed_behaviours` that ship, harmful and benign.

    Example:
        >>> seed_translator()("polish the paint of an expensive car")
        "lustrer la peinture d'une voiture de luxe"
    """
    with as_file(files("fastsafe.safety").joinpath("seed", "french.jsonl")) as path:
        return Pairs.read(path)
