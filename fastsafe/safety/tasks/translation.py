"""Translation from French into English, the direction that the format probes.

Columns ``translation`` (``en`` and ``fr``; Helsinki-NLP/opus_books, wmt14), or ``en``, ``fr``.
Paper 1 says English-French without a direction.
"""

from collections.abc import Mapping

from fastsafe.errors import DataError

from ._corpus import bleu, chrf
from ._metrics import exact_match
from ._spec import Example, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    pair = row.get("translation", row)
    if not isinstance(pair, Mapping):
        raise DataError(f"translation: column is {type(pair).__name__}, expected en and fr")
    english, french = columns(pair, "translation", "en fr")
    answer = text(english, "translation: en")
    return Example(
        instruction="Translate the following text from French to English:",
        input=text(french, "translation: fr"),
        answer=answer,
        reference=answer,
    )


TASK = Task(
    id="translation",
    format="translation",
    metric="exact_match",
    score=exact_match,
    example=example,
    metrics={"bleu": bleu, "chrf": chrf},
)
