"""Prompt templates of judges: text files with ``{fields}``, hashed into the judge's identity.

Templates in our own wording ship in ``data/``, and their judges have ``-ours`` in their id. The
published wording of a family comes from the user, as a file pinned by its sha256, because fastsafe
copies no other project's text.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import cast

from fastsafe.data.conversation import Message, Role
from fastsafe.errors import UsageError

MAX_BYTES = 1 << 20

_FIELD = re.compile(r"\{([a-z_]+)\}")
_SECTION = re.compile(r"(?m)^<<(system|user|assistant)>>\n")
# The opening of a part of a raw prompt: a heading such as "Answer:", or a rule of marks.
_OPENING = re.compile(r"(?m)^(?:[\w# ]{1,24}:|[-#=*]{3,}$)")


@dataclass(frozen=True)
class Template:
    """One prompt template.

    Attributes:
        location: Names it in errors.
        text: The text; lines ``<<system>>``, ``<<user>>`` and ``<<assistant>>`` split it into the
            turns of a chat; without them it is one raw prompt.
        is_ours: Whether the wording ships with fastsafe.
    """

    location: str
    text: str
    is_ours: bool

    @property
    def is_chat(self) -> bool:
        """Whether the template is a chat."""
        return bool(_SECTION.match(self.text))

    @property
    def sha256(self) -> str:
        """Hash of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        return tuple({opening.casefold() for opening in _OPENING.findall(self.text)})

    def prompt(self, values: Mapping[str, str]) -> str:
        """Return the raw prompt. Fields inside filled-in values are not filled again."""
        return _fill(self.text, values)

    def turns(self, values: Mapping[str, str]) -> tuple[Message, ...]:
        """Return the chat, split before fields are filled, so that no judged text opens a turn."""
        _, *parts = _SECTION.split(self.text)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return tuple(
            Message(role=cast(Role, role), content=_fill(text.strip("\n"), values))
            for role, text in pairs
        )

    def escaped(self, text: str) -> str:
        """Return a text with ``| `` before each line that begins like a part of this prompt."""
        return "\n".join(
            f"| {line}" if line.strip().casefold().startswith(self._openings) else line
            for line in text.split("\n")
        )


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: values.get(field[1], field[0]), text)


def template(name: str, path: str = "", sha256: str = "") -> Template:
    """Return a shipped template, or the user's.

    Args:
        name: File of ``data/`` without ``.txt``.
        path: A UTF-8 file with ``{prompt}`` and, to read answers, ``{answer}``, used byte for byte;
            "" takes the shipped template.
        sha256: Expected hash of the file at ``path``, in hex.

    Raises:
        UsageError: The file cannot be read, has another hash, or lacks ``{prompt}``.
    """
    if not path:
        source = files(__package__) / "data" / f"{name}.txt"
        text = source.read_text(encoding="utf-8")
        # {end} keeps a newline before it from editors that allow one at the end of a file
        shipped = text.removesuffix("\n").replace("{end}", "")
        return Template(f"template {name}", shipped, is_ours=True)
    location = f"template {path}"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"{location}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{location}: byte {error.start} is not UTF-8; convert the file"
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{location}: has over {MAX_BYTES} bytes, expected a prompt text")
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256.lower():
        expected = sha256.lower() if sha256 else "template_sha256 to pin it"
        raise UsageError(f"{location}: sha256 is {actual}, expected {expected}")
    if "{prompt}" not in text:
        raise UsageError(
            f"{location}: has no {{prompt}}, expected it where the user's message goes"
        )
    return Template(location, text, is_ours=False)
