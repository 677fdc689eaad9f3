"""WinoGrande (Sakaguchi et al. 2020): which of two names fills the blank of a sentence.

Columns ``sentence`` (with one ``_``), ``option1``, ``option2``, ``answer`` (allenai/winogrande;
1 or 2). Rows of the test split hide the answer and are refused.
"""

from fastsafe.errors import DataError

from ._choices import lettered, multiple_choice, place_of
from ._spec import Example, Row, columns, text


def example(row: Row) -> Example:
    """Read one row."""
    layout = "sentence option1 option2 answer"
    sentence, first, second, answer = columns(row, "winogrande", layout)
    told = text(sentence, "winogrande: sentence")
    if "_" not in told:
        raise DataError(f"winogrande: sentence is {told[:40]!r}, expected one with a blank, _")
    right = place_of(str(answer), ["1", "2"], "winogrande")
    return lettered("winogrande", f"What fills the blank? {told}", [first, second], right)


TASK = multiple_choice("winogrande", example)
