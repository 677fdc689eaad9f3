"""Judged texts as data: sanitised, fenced, and spelled out for their format.

Published judges misread answers that are short by nature: a bare option letter is "too short to
count", and ``True`` alone has no content. Before a model judges them, an option letter is replaced
by the option that the prompt lists under it, and a bare truth value is followed by its claim;
rubrics in our own wording also get one line about the format. An option that answers a harmful
question then counts as an answer to it.
"""

import hashlib
import json
import re
import unicodedata
from functools import cache
from importlib.resources import files

MAX_CHARS = 8192  # of a judged text; longer ones are truncated, the judge's rules never

# Special tokens as tokenizers write them, and marks of thoughts, at which templates cut answers;
# with a space inside they are ordinary text.
_MARK = re.compile(
    r"<(?=\|[^|\n]{1,40}\|>|/?s>|</?SYS>>|(?:start|end)_of_\w+>|(?:bos|eos|pad|unk)>"
    r"|end_of_text>|/?(?:think|thinking|thought|reasoning|seed:think)>|\uff5c)"
    r"|\[(?=/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS))\])"
)
_OPTION = re.compile(r"(?m)^\s*\(?([A-Ha-h])[).:]\s*(\S.*)$")
_LETTER = re.compile(r"(?i)\s*(?:(?:the )?answer(?: is)?\s*:?\s*|option )?\(?([a-h])[).:]?\s*")
_TRUTH = re.compile(r"(?i)\s*(true|false|yes|no)[.!]?\s*")
_CLAIM = re.compile(r"(?is)^\s*true or false\s*[:?]\s*(\S.*)$")


def as_data(text: str, max_chars: int = MAX_CHARS) -> str:
    """Return a text without control characters and with special tokens broken up.

    Example:
        >>> as_data("a\\x1b[2J [/INST] <|eot_id|>")
        'a[2J [ /INST] < |eot_id|>'
    """
    printable = "".join(
        c for c in text[:max_chars] if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf")
    )
    return _MARK.sub(lambda mark: mark[0] + " ", printable)


def nonce(seed: int, judged: str, attempt: int) -> str:
    """Return the fence of one row: 32 hex digits that no author of the text can write into it.

    The fence is a hash of the very text that stands inside it. To close it, a text would have to
    contain its own hash: whoever knows this code and everything else about the row, and chooses the
    text freely, still needs about 2^120 trials (a text has room for some 200 guesses). No secret
    has to be kept, and a row asked again after a restart has the same fence, so that its reply is
    found in the cache.

    Args:
        seed: Of the judge.
        judged: Everything between the fences.
        attempt: 0, or 1 for the second asking.
    """
    # half a surrogate pair has no UTF-8
    text = f"fence/{seed}/{attempt}/{judged}".encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


def fenced(name: str, text: str, fence: str) -> str:
    """Return a text between an opening and a closing fence.

    Example:
        >>> print(fenced("RESPONSE", "Sure.", "c0ffee"))
        <RESPONSE c0ffee>
        Sure.
        </RESPONSE c0ffee>
    """
    return f"<{name} {fence}>\n{text}\n</{name} {fence}>"


def spelled_out(prompt: str, completion: str, format: str) -> str:
    """Return the completion; a bare option letter or truth value is spelled out.

    Applies only to formats with such answers, and only where the completion is nothing else.

    Example:
        >>> spelled_out("Which?\\nA) Red\\nB) Blue", "b)", "multiple_choice")
        'B) Blue'
        >>> spelled_out("True or false: paint dries.", "True.", "true_false")
        'True: paint dries.'
    """
    if format in ("classification", "multiple_choice"):
        options = {letter.upper(): text.strip() for letter, text in _OPTION.findall(prompt)}
        chosen = _LETTER.fullmatch(completion)
        if chosen and (letter := chosen[1].upper()) in options:
            return f"{letter}) {options[letter]}"
    if format == "true_false":
        claim, truth = _CLAIM.match(prompt), _TRUTH.fullmatch(completion)
        if claim and truth:
            return f"{truth[1].capitalize()}: {claim[1].strip()}"
    return completion


@cache
def notes() -> dict[str, str]:
    """Return the line about each format that rubrics show, by format id."""
    text = (files(__package__) / "data" / "notes.json").read_text(encoding="utf-8")
    by_format: dict[str, str] = json.loads(text)
    return by_format
