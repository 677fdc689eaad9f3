"""Variables of a chat template that a user sets, such as ``enable_thinking``."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fastsafe.errors import UsageError

NAME = "chat_template_kwargs"  # as servers of models call them
MAX_CHARS = 1 << 16  # of all variables as JSON
MAX_DEPTH = 8

# The arguments of transformers' apply_chat_template are no variables, and the conversation itself
# is not for the user to set.
RESERVED = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenizer_kwargs"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "additional_special_tokens"),
        *(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    }
)


def check_variables(variables: Any, location: str = NAME) -> dict[str, Any]:
    """Return template variables that are checked: names of Jinja, values of JSON.

    A template ignores variables that it does not read.

    Args:
        variables: A mapping of names to values; None is empty.
        location: Names the mapping in errors.

    Raises:
        UsageError: It is no mapping, a name is reserved or no name, or a value is no JSON, too
            deep or too large.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise UsageError(
            f"{location} is {type(variables).__name__}, expected a mapping of names to values"
        )
    for name, value in variables.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise UsageError(f"{location}: {name!a:.80} is no variable, expected a Jinja name")
        if name in RESERVED:
            raise UsageError(
                f"{location}: {name} is set by fastsafe itself, expected another variable of the "
                "template; leave it out"
            )
        _check_json(value, f"{location}: {name}", MAX_DEPTH)
    size = len(json.dumps(dict(variables)))
    if size > MAX_CHARS:
        raise UsageError(
            f"{location} is {size} characters as JSON, expected at most {MAX_CHARS}; shorten it"
        )
    return dict(variables)


def _check_json(value: Any, location: str, depth: int) -> None:
    if isinstance(value, Mapping | list | tuple):
        if not depth:
            raise UsageError(f"{location} is nested deeper than {MAX_DEPTH} levels; flatten it")
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise UsageError(f"{location} has a key that is no text, expected JSON; quote it")
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_json(inner, location, depth - 1)
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"{location} has a lone surrogate, expected Unicode text")
    elif isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise UsageError(f"{location} is a number beyond 64 bits, expected a smaller one")
    elif not (value is None or (isinstance(value, float) and math.isfinite(value))):
        raise UsageError(
            f"{location} is {value!r:.40}, expected a value of JSON: text, number, true, false, "
            "null, list or mapping"
        )
