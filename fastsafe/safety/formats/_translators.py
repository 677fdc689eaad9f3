"""Translations of behaviours for the translation format, from a file or by a model.

A run records its translator, since another one gives other prompts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from fastsafe.data.records import records
from fastsafe.data.thoughts import reply_of
from fastsafe.errors import DataError, shown
from fastsafe.io.digest import file_sha256
from fastsafe.safety.completers.protocol import Ask, Completer


@dataclass(frozen=True)
class TranslationTable:
    """Translations by text."""

    translator_id: str
    translations: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "TranslationTable":
        """Read translations from a file.

        Args:
            path: As `records`, with columns ``text`` and ``translation``.

        Raises:
            DataError: The file is malformed, a text is empty, or one has two translations.
        """
        path = Path(path)
        translations: dict[str, str] = {}
        for location, _, row in records(path):
            text, translation = (str(row.get(c, "")).strip() for c in ("text", "translation"))
            if not text or not translation:
                raise DataError(
                    f"{location}: columns are {shown(', '.join(row), 200)}, expected "
                    "text and translation, both with words in them"
                )
            if translations.setdefault(text, translation) != translation:
                raise DataError(f"{location}: {shown(text)} has two translations; keep one")
        return cls(f"pairs:{file_sha256(path)[:16]}", translations)

    @classmethod
    def by_model(cls, completer: Completer, texts: Sequence[str]) -> "TranslationTable":
        """Translate texts into French with a model, the audited one or another.

        A reply that is empty, truncated, equal to the text or a refusal is an error. Other wrong
        translations are not detected.

        Raises:
            DataError: A reply is no translation.
        """
        from fastsafe.safety.judges.refusal import JUDGE
        from fastsafe.safety.verdict import Verdict

        instruction = "Translate the text into French. Reply with the translation alone."
        instruction_sha256 = hashlib.sha256(instruction.encode()).hexdigest()
        translator_id = f"model:{completer.identity[:16]}:{instruction_sha256[:16]}"
        translations: dict[str, str] = {}
        asks = [
            Ask(key=text, messages=({"role": "user", "content": f"{instruction}\n\n{text}"},))
            for text in dict.fromkeys(texts)
        ]
        for reply in completer.complete(asks):
            text, translation = reply.key, (reply_of(reply.text) or "").strip()
            is_refusal = JUDGE.judge("", translation, True).verdict is Verdict.REFUSED
            if reply.finish != "stop" or translation in ("", text) or is_refusal:
                got = "a refusal" if is_refusal or reply.finish == "refused" else "no translation"
                raise DataError(
                    f"translator {translator_id}: {shown(text)} got {got}; use another model, or a "
                    "file of pairs"
                )
            translations[text] = translation
        return cls(translator_id, translations)

    def __call__(self, text: str) -> str:
        """Return the translation of a text.

        Raises:
            DataError: The table has none.
        """
        if text not in self.translations:
            raise DataError(
                f"translator {self.translator_id}: no translation of {shown(text)}, expected one "
                "in the file; add a row to data.translations, or name a model in data.translator"
            )
        return self.translations[text]


def seed_translator() -> TranslationTable:
    """Return the shipped French translations of `seed_behaviours`, harmful and benign.

    Example:
        >>> seed_translator()("polish the paint of an expensive car")
        "lustrer la peinture d'une voiture de luxe"
    """
    with as_file(files("fastsafe.safety").joinpath("seed", "french.jsonl")) as path:
        return TranslationTable.read(path)
