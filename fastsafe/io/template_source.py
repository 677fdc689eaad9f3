"""The source of a chat template, put into words that minijinja reads as Jinja does.

minijinja is not Jinja: where it would print something else without a word, the source is changed or
refused here. What it refuses itself needs no care.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from fastsafe.errors import TokenizerError

_NEWLINE = re.compile(r"\r\n?")  # Jinja reads each kind as a line feed
_TEXT = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""  # a string literal
_PARTS = re.compile(f"({_TEXT})", re.DOTALL)
_OPEN = re.compile(r"\{[{%#][-+]?")
_END_OF_RAW = re.compile(r"\{%[-+]?\s*endraw\b")
# a literal, the end of the tag, or a quote that nothing ends
_NEXT = {
    close[0]: re.compile(rf"{_TEXT}|(?P<end>[-+]?{re.escape(close)})|['\"]", re.DOTALL)
    for close in ("}}", "%}")
}
_NUMBER = r"(?<![\w.])[0-9][0-9_]*"
# transformers' tag around the assistant's text opens a scope, as {% with %} does
_SCOPES = {"generation": "with", "endgeneration": "endwith"}
_TITLE = re.compile(r"\.\s*title\(\s*\)(?!\s*[.\[(])")
_REFUSED = {
    "attr(...), which reads keys here": re.compile(r"\|\s*attr\b"),
    "a number with an exponent, which prints without one here": re.compile(
        rf"{_NUMBER}(?:\.[0-9_]+)?[eE][-+]?[0-9]"
    ),
    "a whole number with a point as JSON, which prints without the point here": re.compile(
        rf"\A(?>.*?{_NUMBER}\.0+(?![0-9])).*\|\s*tojson\b",
        re.DOTALL,  # linear in time
    ),
    "title() before another call or index": re.compile(r"\.\s*title\(\s*\)\s*[.\[(]"),
}


@lru_cache(maxsize=16)
def for_minijinja(source: str) -> str:
    """Return the source of a chat template for minijinja, in time linear in its length.

    Raises:
        TokenizerError: minijinja would render a part of it in another way than Jinja.
    """
    return "".join(_changed(_NEWLINE.sub("\n", source)))


def _changed(source: str) -> Iterator[str]:
    at = 0
    while opened := _OPEN.search(source, at):
        begin = opened.end()
        kind = opened[0][1]
        end = source.find("#}", begin) if kind == "#" else _end_of_tag(source, begin, kind)
        if end < 0:
            break  # minijinja names the line
        yield source[at:begin]
        code = source[begin:end]
        scope = _SCOPES.get(code.strip()) if kind == "%" else None
        yield f" {scope} " if scope else code if kind == "#" else _code(code)
        at = end
        if kind == "%" and code.strip() == "raw":
            closing = _END_OF_RAW.search(source, at)
            if closing is None:
                break
            yield source[at : closing.start()]
            at = closing.start()
    yield source[at:]


def _end_of_tag(source: str, at: int, kind: str) -> int:
    """Return the index of the tag's closing brackets, -1 without any."""
    while part := _NEXT["}" if kind == "{" else "%"].search(source, at):
        if part["end"]:
            return part.start()
        if len(part[0]) == 1:
            break
        at = part.end()
    return -1


def _code(code: str) -> str:
    """Change the code of a tag, but not its string literals."""
    parts = _PARTS.split(code)
    plain = "''".join(parts[::2])
    for problem, pattern in _REFUSED.items():
        if pattern.search(plain):
            raise TokenizerError(
                f"chat template: it has {problem}, expected what minijinja renders as Jinja does; "
                "write that part in another way"
            )
    # Python's title() has its own idea of words, which minijinja's has not
    parts[::2] = [_TITLE.sub("|python_title", part) for part in parts[::2]]
    return "".join(parts)
