"""A model that rewords rows: asked for all of them at once, and never twice for the same one.

Without it, templates word the rows. Its wording is checked row by row (``rewrite_checks``).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fastsafe.data.conversation import Message
from fastsafe.data.thoughts import reply_of
from fastsafe.errors import DataError
from fastsafe.safety.completers.ledger import Ledger
from fastsafe.safety.completers.protocol import Ask, Completer
from fastsafe.safety.mixing.rewrite_checks import Rewrite

BATCH_ROWS = 512  # replies that a killed run may lose

T = TypeVar("T")


class Rewriter:
    """Rewords rows by a model, with its replies cached in a folder."""

    def __init__(
        self, open: Callable[[], Completer], *, max_tokens: int, folder: Path | None = None
    ) -> None:
        """Configure the rewriter; the model is open only while it answers.

        Args:
            open: Opens the model.
            max_tokens: Maximum length of a reply.
            folder: Folder of the replies of all runs; None keeps them in memory.
        """
        self._open = open
        self._max_tokens = max_tokens
        self._folder = folder
        self._replies: dict[str, str] = {}  # "": no usable reply

    @cached_property
    def identity(self) -> str:
        """Return the sha256 of the model and its settings; the rows hold the requests."""
        parts = ["rewrite 1", self._open().identity, self._max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def apply(
        self, make: Callable[[Rewrite], T], on_replies: Callable[[int], None] | None = None
    ) -> T:
        """Return the result of ``make`` in the model's wording.

        Args:
            make: Makes rows with the rewrite that it is given, deterministically. It is called
                again until it asks for nothing new; a rewrite without a reply yet returns None.
            on_replies: Called with the number of new replies after every batch.

        Raises:
            DataError: The model answered no row.
            FastsafeError: The model cannot be opened or asked.
        """
        while True:
            pending: dict[str, Sequence[Message]] = {}

            def rewrite(
                turns: Sequence[Message], pending: dict[str, Sequence[Message]] = pending
            ) -> str | None:
                key = self._key(turns)
                if key not in self._replies:
                    pending[key] = turns
                return reply_of(self._replies.get(key, "")) or None

            result = make(rewrite)
            if not pending:
                return result
            self._ask(pending, on_replies or (lambda count: None))

    def _key(self, turns: Sequence[Message]) -> str:
        return hashlib.sha256(json.dumps([self.identity, turns]).encode()).hexdigest()

    def _ask(
        self, pending: Mapping[str, Sequence[Message]], on_replies: Callable[[int], None]
    ) -> None:
        ledger = Ledger(self._folder)
        self._replies |= {key: cached[0] for key in pending if (cached := ledger.reply(key))}
        asks = [
            Ask(key=key, messages=tuple(turns), max_tokens=self._max_tokens)
            for key, turns in pending.items()
            if key not in self._replies
        ]
        completer = self._open() if asks else None
        cause = ""
        on_replies(len(pending) - len(asks))
        for begin in range(0, len(asks), BATCH_ROWS):
            assert completer is not None
            batch = asks[begin : begin + BATCH_ROWS]
            for reply in completer.complete(batch):
                # a truncated reply or a refusal is the model's answer; a failure is transient
                self._replies[reply.key] = reply.text if reply.finish == "stop" else ""
                if reply.finish == "error":
                    cause = reply.text
                else:
                    ledger.keep(reply.key, self._replies[reply.key], "[]", reply.finish)
            on_replies(len(batch))
        ledger.close()
        if cause and not any(self._replies[key] for key in pending):
            raise DataError(f"rewrite: the model answered none of {len(pending)} rows: {cause}")
