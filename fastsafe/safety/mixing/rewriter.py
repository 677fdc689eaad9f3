"""A model that words rows: asked for all of them at once, and never twice for the same.

Templates word them without it. What it says is checked row by row (``rewrite_checks``).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fastsafe.data.conversation import Message
from fastsafe.errors import DataError
from fastsafe.safety.completers.ledger import Ledger
from fastsafe.safety.completers.protocol import Ask, Completer
from fastsafe.safety.mixing.rewrite_checks import Rewrite

ASKED_AT_ONCE = 512  # replies that a killed run may have to ask for again

T = TypeVar("T")


class Rewriter:
    """Words rows by a model; what it has said is kept in a folder."""

    def __init__(
        self, open: Callable[[], Completer], *, max_tokens: int, folder: Path | None = None
    ) -> None:
        """Remember how to open the model; it is held only while it answers.

        Args:
            open: Gives the model.
            max_tokens: Of a reply.
            folder: Where replies are kept between runs; None forgets them.
        """
        self._open = open
        self._max_tokens = max_tokens
        self._folder = folder
        self._said: dict[str, str] = {}

    @cached_property
    def identity(self) -> str:
        """sha256 of the model and its settings; what it is asked stands in the rows."""
        parts = ["rewrite 1", self._open().identity, self._max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def apply(self, make: Callable[[Rewrite], T], said: Callable[[int], None] | None = None) -> T:
        """Return what ``make`` makes with the model's words.

        Args:
            make: Takes the model and makes rows, always the same of the same words. It is called
                until it asks for nothing new; what is not answered yet is None.
            said: Told how many replies came, each time that some do.

        Raises:
            DataError: The model answered nothing.
            FastsafeError: It cannot be asked.
        """
        while True:
            wanted: dict[str, Sequence[Message]] = {}

            def rewrite(
                turns: Sequence[Message], wanted: dict[str, Sequence[Message]] = wanted
            ) -> str | None:
                key = self._key(turns)
                if key not in self._said:
                    wanted[key] = turns
                return self._said.get(key) or None

            made = make(rewrite)
            if not wanted:
                return made
            self._ask(wanted, said or _nobody)

    def _key(self, turns: Sequence[Message]) -> str:
        return hashlib.sha256(json.dumps([self.identity, turns]).encode()).hexdigest()

    def _ask(self, wanted: Mapping[str, Sequence[Message]], said: Callable[[int], None]) -> None:
        ledger = Ledger(self._folder)
        self._said |= {key: kept[0] for key in wanted if (kept := ledger.reply(key))}
        asks = [
            Ask(key=key, messages=tuple(turns), max_tokens=self._max_tokens)
            for key, turns in wanted.items()
            if key not in self._said
        ]
        completer = self._open() if asks else None
        cause = ""
        said(len(wanted) - len(asks))
        for begin in range(0, len(asks), ASKED_AT_ONCE):
            assert completer is not None
            some = asks[begin : begin + ASKED_AT_ONCE]
            for reply in completer.complete(some):
                # cut off or declined is the model's answer; a failure may pass
                self._said[reply.key] = reply.text if reply.finish == "stop" else ""
                if reply.finish == "error":
                    cause = reply.text
                else:
                    ledger.keep(reply.key, self._said[reply.key], "[]", reply.finish)
            said(len(some))
        ledger.close()
        if cause and not any(self._said[key] for key in wanted):
            raise DataError(f"rewrite: the model answered none of {len(wanted)} rows: {cause}")


def _nobody(count: int) -> None:
    """Nobody wants to know."""
