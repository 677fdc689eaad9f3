"""Translators: who puts a behaviour into the language of the translation format.

Which translator it was belongs in a run's record: another one makes other prompts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from fastsafe.data.records import records
from fastsafe.data.tables import file_sha256
from fastsafe.errors import DataError
from fastsafe.safety.completers.protocol import Ask, Completer


@dataclass(frozen=True)
class Pairs:
    """Translations that were written down, text by text."""

    translator_id: str
    translations: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "Pairs":
        """Read translations from a file.

        Args:
            path: As `records`, with columns ``text`` and ``translation``.

        Raises:
            DataError: The file is malformed, a text is empty, or one has two translations.
        """
        path = Path(path)
        found: dict[str, str] = {}
        for number, (_, _, row) in enumerate(records(path), start=1):
            text, translation = (str(row.get(c, "")).strip() for c in ("text", "translation"))
            if not text or not translation:
                raise DataError(
                    f"{path}: row {number}: columns are {', '.join(map(str, row))}, expected "
                    "text and translation, both with words in them"
                )
            if found.setdefault(text, translation) != translation:
                raise DataError(f"{path}: row {number}: {text!r} has two translations; keep one")
        return cls(f"pairs:{file_sha256(path)[:16]}", found)

    @classmethod
    def by_model(
        cls, completer: Completer, texts: Sequence[str], language: str = "French"
    ) -> "Pairs":
        """Have a model translate, the audited one or another.

        It may answer otherwise than with a translation: an empty reply, one that was cut, the text
        itself and an opening refusal are errors; what else may be wrong nothing here can see.

        Raises:
            DataError: A reply is no translation.
        """
        from fastsafe.safety.judges.refusal import JUDGE
        from fastsafe.safety.verdict import Verdict

        told = f"Translate the text into {language}. Reply with the translation alone."
        by = f"model:{completer.identity[:16]}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        found: dict[str, str] = {}
        asks = [
            Ask(key=text, messages=({"role": "user", "content": f"{told}\n\n{text}"},))
            for text in dict.fromkeys(texts)
        ]
        for reply in completer.complete(asks):
            text, said = reply.key, reply.text.strip()
            is_refusal = JUDGE.judge("", said, True).verdict is Verdict.REFUSED
            if reply.finish != "stop" or not said or said == text or is_refusal:
                got = "a refusal" if is_refusal or reply.finish == "refused" else "no translation"
                raise DataError(
                    f"translator {by}: {text!r} got {got}; use another model, or a file of pairs"
                )
            found[text] = said
        return cls(by, found)

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


def seed_translator() -> Pairs:
    """Return the French translations of `seed_behaviours` that ship, harmful and benign.

    Example:
        >>> seed_translator()("polish the paint of an expensive car")
        "lustrer la peinture d'une voiture de luxe"
    """
    with as_file(files("fastsafe.safety").joinpath("seed", "french.jsonl")) as path:
        return Pairs.read(path)
