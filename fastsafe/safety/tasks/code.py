"""Code generation: write the program that was asked for, in whatever language.

Columns ``instruction``, ``input``, ``output`` (TokenBender/code_instructions_122k_alpaca_style,
which the one released sample row of paper 1 resembles), or ``prompt``, ``completion``. A column
``tests``, assertions in Python, is ours: `fastsafe.safety.sandbox` runs them.
"""

import ast
import re
import warnings

from ._corpus import Pairs, chrf, share
from ._metrics import exact_match, normalised
from ._spec import Example, Measured, Row, Task, columns, text


def example(row: Row) -> Example:
    """Read one row."""
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
    """Return the code of an answer: its first fenced block, or all of it where there is none.

    Example:
        >>> source_of("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
        'x = 1'
    """
    found = re.search(r"^```[^\n]*\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    return (found[1] if found else text).strip("\n")


def parses(text: str) -> bool:
    """Whether the code of an answer is Python by its grammar, and holds a statement."""
    try:
        with warnings.catch_warnings(action="ignore"):  # an unknown escape still parses
            return bool(ast.parse(source_of(text)).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def parse_rate(pairs: Pairs) -> Measured:
    """Return the share of answers that parse, over the rows whose reference is Python.

    Other languages have no grammar here; ``n`` says how many rows are left.
    """
    return share([parses(completion) for completion, reference in pairs if parses(reference)])


def exact_code(pairs: Pairs) -> Measured:
    """Return the share of answers whose code is the reference's, white space aside."""
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
