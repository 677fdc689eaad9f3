"""WinoGrande (Sakaguchi et al. 2020): the one of two names that fills the blank of a sentence.

Columns ``sentence`` (with one ``_``), ``option1``, ``option2``, ``answer`` (allenai/winogrande;
1 or 2). Rows of the test split hide the answer and are refused.
"""

from fastsafe.errors import DataError

from ._choices import index_of, lettered, multiple_choice
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layout = "sentence option1 option2 answer"
    sentence, first, second, answer = columns(row, "winogrande", layout)
    blanked = text(sentence, "winogrande: sentence")
    if "_" not in blanked:
        raise DataError(f"winogrande: sentence is {blanked[:40]!r}, expected one with a blank, _")
    right = index_of(str(answer), ["1", "2"], "winogrande")
    return lettered("winogrande", f"What fills the blank? {blanked}", [first, second], right)


TASK = multiple_choice("winogrande", example)
