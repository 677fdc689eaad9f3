"""Code generation, in any programming language.

Columns ``instruction``, ``input``, ``output`` (TokenBender/code_instructions_122k_alpaca_style,
which the one released sample row of paper 1 resembles), or ``prompt``, ``completion``. A column
``tests``, assertions in Python, is ours: `fastsafe.safety.sandbox` runs them.
"""

import ast
import re
import warnings

from fastsafe.data.thoughts import answer_of

from ._corpus import Pairs, chrf, share
from ._metrics import exact_match, normalised
from ._spec import Example, Measured, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "instruction input output", "prompt completion"
    asked, *given, output = columns(row, "code", *layouts)
    answer = text(output, "code: output")
    return Example(
        instruction=text(asked, "code: instruction"),
        input=str(given[0] or "").strip() if given else "",
        answer=answer,
        reference=answer,
        tests=str(row.get("tests") or ""),
    )


def source_of(text: str) -> str:
    """Return the code of an answer: its first fenced block, or the whole text without one.

    Example:
        >>> source_of("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
        'x = 1'
    """
    text = answer_of(text)
    block = re.search(r"^```[^\n]*\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    return (block[1] if block else text).strip("\n")


def parses(text: str) -> bool:
    """Return whether the code of an answer parses as Python and has a statement."""
    try:
        with warnings.catch_warnings(action="ignore"):  # an unknown escape still parses
            return bool(ast.parse(source_of(text)).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def parse_rate(pairs: Pairs) -> Measured:
    """Return the share of answers that parse, over the ``n`` rows whose reference is Python."""
    return share([parses(completion) for completion, reference in pairs if parses(reference)])


def exact_code(pairs: Pairs) -> Measured:
    """Return the share of answers whose code equals the reference's, apart from white space."""
    return share([normalised(source_of(a)) == normalised(source_of(b)) for a, b in pairs])


def code_chrf(pairs: Pairs) -> Measured:
    """Return the chrF of the answers' code alone."""
    return chrf([(source_of(a), source_of(b)) for a, b in pairs])


TASK = Task(
    id="code",
    format="code",
    metric="exact_match",
    score=exact_match,
    example=example,
    metrics={"parse_rate": parse_rate, "exact_match": exact_code, "chrf": code_chrf},
)
