"""A completer that a test scripts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastsafe.safety.completer import Ask, Reply


@dataclass
class Scripted:
    """Answers each ask by a function of it: a text, odds of the labels, or a whole reply."""

    answer: Callable[[Ask], Any]
    seen: list[Ask] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return hashlib.sha256(b"scripted").hexdigest()

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.seen += asks
        replies = []
        for ask in asks:
            said = self.answer(ask)
            if isinstance(said, str):
                said = Reply(key=ask.key, text=said)
            elif isinstance(said, tuple):
                said = Reply(key=ask.key, logprobs=said)
            replies.append(said)
        return replies


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted
