"""Bounds on what a tokenizer.json makes of a text, checked before the tokenizers library loads it.

A few replacements in a row multiply a text until memory is gone, which ends the process: the
library aborts and raises nothing. Everything but the vocabulary is read here, and refused if it
multiplies a text too much, adds too much to it, or names what the library would panic on.
"""

import json
import math
import re
import unicodedata
from base64 import b64decode
from collections.abc import Iterator, Mapping
from typing import Any

from fastsafe.errors import shown
from fastsafe.io.json_file import parse_json, unique_keys

MAX_GROWTH = 400  # times; ALBERT's chain of normalizers may reach 324 for one rare character
MAX_ADDED_CHARS = 64  # what one part puts before a text or beside a word
MAX_PARTS = 64  # in a chain
MAX_POST_IDS = 1024
MAX_COUNT = 1000  # of a regular expression's {n}, and of characters that a decoder strips
MAX_UNUSUAL_BYTES = 64 << 20  # files whose model is not their last part are parsed as a whole

_CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")
_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)
_UNICODE_GROWTH = {"NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Lowercase": 3, "BertNormalizer": 12}
# One class, escape or character, at least once: such a pattern matches no empty text.
_PLAIN = re.compile(r"(\\.|\[\^?[^]\\]+\]|[^\\()[\]*+?{}|.^$])+(\+|\{[1-9]\d*(,\d*)?\})?")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_CLASS_OR_ESCAPE = re.compile(r"\[\^?\]?(\\.|[^]\\])*+\]?|\\[^1-9gk]", re.DOTALL)
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9gk]")
_THREE_LOOPS = re.compile(r"([*+]|,\})([^|]*?([*+]|,\})){2}")


def read_parts(data: bytes) -> dict[str, Any]:
    """Parse the parts of a tokenizer.json beside its model.

    Raises:
        ValueError: It is no JSON object, or it is large and its model is not the last part.
    """
    parts = _parts_before_model(data)
    if parts is not None:
        return parts
    if len(data) > MAX_UNUSUAL_BYTES:
        raise ValueError(
            f"a part stands behind the model of a file of {len(data)} bytes, expected the model as "
            "the last part"
        )
    try:
        whole = parse_json(data)
    except ValueError as error:
        raise ValueError(f"content is not JSON ({error}), expected a tokenizer") from None
    if not isinstance(whole, dict):
        raise ValueError(f"JSON is a {type(whole).__name__}, expected an object")
    return {name: part for name, part in whole.items() if name != "model"}


def _parts_before_model(data: bytes) -> dict[str, Any] | None:
    """Parse what stands before the model, which the tokenizers library writes last.

    Returns:
        None if the file is not laid out like that, or may have another part behind the model.
    """
    try:
        text = data[: data.index(b'"vocab"')].decode()
        parts: dict[str, Any] = {}
        at = text.index("{") + 1
        while True:
            key, at = _value(text, at)
            at = text.index(":", at) + 1
            if key == "model":
                break
            if not isinstance(key, str) or key in parts:
                return None
            parts[key], at = _value(text, at)
    except (ValueError, RecursionError):
        return None
    return parts if _is_last_part(data, len(text[:at].encode())) else None


def _value(text: str, start: int) -> tuple[Any, int]:
    """Parse the value behind spaces and commas; return it and where it ends."""
    while text[start : start + 1] in (" ", "\n", "\r", "\t", ","):
        start += 1
    return _JSON.raw_decode(text, start)


def _is_last_part(data: bytes, start: int) -> bool:
    """Return whether no object but the model and its vocabulary is a key's value from there on.

    A brace that follows a quote and a colon follows a key: inside a text the quote is escaped.
    """
    brace = data.find(b"{", start)
    while brace != -1:
        before = data[max(0, brace - 64) : brace].rstrip()
        key = before.removesuffix(b":").rstrip()
        named = not key or (key != before and key.endswith(b'"') and not key.endswith(b'\\"'))
        if named and not key.endswith((b'"model"', b'"vocab"')):
            return False
        brace = data.find(b"{", brace + 1)
    return True


def check_parts(parts: Mapping[str, Any]) -> None:
    """Check every part but the model.

    Raises:
        ValueError: A part is out of bounds; the message does not name the file.
    """
    for name in ("normalizer", "decoder"):
        growth = _growth(list(_chain(parts.get(name), name)))
        if growth > MAX_GROWTH:
            raise ValueError(
                f"{name} makes a text up to {growth:.3g} times as long, expected at most "
                f"{MAX_GROWTH} times"
            )
    for part in _chain(parts.get("pre_tokenizer"), "pre_tokenizer"):
        if part.get("type") == "FixedLength" and not part.get("length"):
            raise ValueError("pre_tokenizer has pieces of length 0, expected 1 or more")
    _check_post_processor(list(_chain(parts.get("post_processor"), "post_processor")))
    for pattern in _patterns(parts):
        counts = [int(n) for pair in _COUNT.findall(pattern) for n in pair if n]
        if math.prod(max(1, n) for n in counts) > MAX_COUNT:
            raise ValueError(
                f"a regular expression repeats {max(counts)} times, expected at most {MAX_COUNT}"
            )


def can_panic(parts: Mapping[str, Any]) -> bool:
    """Return whether a regular expression may try so many ways that the library gives up."""
    bare = [_CLASS_OR_ESCAPE.sub("x", pattern) for pattern in _patterns(parts)]
    return any(_REPEATED_GROUP.search(each) or _THREE_LOOPS.search(each) for each in bare)


def _chain(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part, those of nested sequences in their order."""
    stack = [part] if isinstance(part, dict) else []
    seen = 0
    while stack:
        step = stack.pop()
        seen += 1
        if seen > MAX_PARTS:
            raise ValueError(f"{name} has more steps than expected, at most {MAX_PARTS}")
        children = next((step[key] for key in _CHILDREN if isinstance(step.get(key), list)), None)
        if children is None:
            yield step
        else:
            stack += [child for child in reversed(children) if isinstance(child, dict)]


def _growth(steps: list[dict[str, Any]]) -> float:
    unicode = max((_UNICODE_GROWTH.get(str(step.get("type")), 1) for step in steps), default=1)
    return float(unicode * math.prod(_step_growth(step) for step in steps))


def _step_growth(step: Mapping[str, Any]) -> float:
    kind = step.get("type")
    for key in ("prepend", "prefix", "suffix", "content", "word_delimiter_token", "cleanup"):
        value = step.get(key)
        if kind != "Replace" and isinstance(value, str) and len(value) > MAX_ADDED_CHARS:
            raise ValueError(
                f"{kind!s:.40} adds {len(value)} characters, expected at most {MAX_ADDED_CHARS}"
            )
    if kind == "Strip":
        for key in ("start", "stop"):
            if isinstance(step.get(key), int) and step[key] > MAX_COUNT:
                raise ValueError(f"Strip has {key} {step[key]}, expected at most {MAX_COUNT}")
    if kind == "ByteLevel":
        return 4.0
    if kind == "Replace":
        return _replace_growth(step)
    if kind == "Precompiled":
        return max(1.0, float(_longest_text(str(step.get("precompiled_charsmap", "")))))
    return 1.0


def _replace_growth(step: Mapping[str, Any]) -> float:
    pattern = step.get("pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    # later steps may take a ligature of the content apart
    content = len(unicodedata.normalize("NFKD", str(step.get("content", ""))))
    if isinstance(pattern.get("String"), str) and pattern["String"]:
        return max(1.0, content / len(pattern["String"]))
    matches_nothing = not _PLAIN.fullmatch(str(pattern.get("Regex", "")))
    return max(1.0, content + matches_nothing)


def _longest_text(charsmap: str) -> int:
    """Return the length of the longest text that a SentencePiece character map puts in place."""
    try:
        blob = b64decode(charsmap)
    except ValueError:
        return 1  # the library refuses it
    texts = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max((len(text.decode(errors="replace")) for text in texts.split(b"\0")), default=1)


def _check_post_processor(steps: list[dict[str, Any]]) -> None:
    copies = 1
    ids = 0
    for step in steps:
        if step.get("type") != "TemplateProcessing":
            continue
        pieces = step.get("single")
        pieces = (
            [each for each in pieces if isinstance(each, dict)] if isinstance(pieces, list) else []
        )
        copies *= max(1, sum("Sequence" in piece for piece in pieces))
        known = step.get("special_tokens")
        known = known if isinstance(known, dict) else {}
        for piece in pieces:
            special = piece.get("SpecialToken")
            if not isinstance(special, dict):
                continue
            name = special.get("id")
            token = known.get(name) if isinstance(name, str) else None
            if not isinstance(token, dict):
                raise ValueError(
                    f"post_processor adds {shown(name)}, expected one of its special_tokens"
                )
            ids += len(token["ids"]) if isinstance(token.get("ids"), list) else 1
    if copies > 2 or ids > MAX_POST_IDS:
        raise ValueError(
            f"post_processor makes {copies} copies of a text and adds {ids} ids, expected at most "
            f"2 and {MAX_POST_IDS}"
        )


def _patterns(parts: Mapping[str, Any]) -> Iterator[str]:
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _chain(parts.get(name), name):
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
                yield pattern["Regex"]
