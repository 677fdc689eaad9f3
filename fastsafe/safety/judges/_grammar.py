"""The grammar of judges' replies: whole lines, whole labels, no default.

What a judge thinks before it replies is not read, so that no draft of a verdict counts. Outer white
space, one code fence around the reply, and emphasis marks are dropped first. Then whole lines must
match. No number is ever parsed: the allowed values of a field are listed as text, so that ``5/5``,
``4.``, a typographic minus and digits of another script match nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastsafe.data.thoughts import reply_of
from fastsafe.safety.completers.protocol import Reply
from fastsafe.safety.judges._spec import Unreadable

MIN_LABEL_MASS = 0.9  # of probability, on all labels together

_FENCE = re.compile(r"\A(`{3,}|~{3,})[^\n`~]*\n(.*?)\n?\1\Z", re.DOTALL)
_EMPHASIS = re.compile(r"\*\*|__|[*`]")


def plain(text: str) -> str:
    """Return a reply without thoughts, outer white space, a code fence around it, and emphasis.

    Raises:
        Unreadable: The thought never ends.
    """
    reply = reply_of(text)
    if reply is None:
        raise Unreadable("the thought never ends, expected a reply behind it")
    text = reply.strip()
    if fenced := _FENCE.match(text):
        text = fenced[2]
    return _EMPHASIS.sub("", text).strip()


@dataclass(frozen=True)
class Field:
    """One line ``name: value`` of a reply; ``values`` are the allowed texts."""

    name: str
    values: tuple[str, ...]

    @property
    def demand(self) -> str:
        """The line as templates show it, e.g. ``Final Verdict: 1 or -1``."""
        return f"{self.name}: {' or '.join(self.values)}"

    def read(self, text: str) -> str:
        """Return the value of this field in a reply, in the spelling of ``values``.

        Raises:
            Unreadable: No line has the field, a line has another value, or two lines differ.

        Example:
            >>> Field("Final Verdict", ("1", "-1")).read("**Final Verdict:** -1")
            '-1'
        """
        allowed = {value.casefold(): value for value in self.values}
        given = set()
        for line in plain(text).splitlines():
            name, colon, value = line.partition(":")
            if not colon or name.strip().casefold() != self.name.casefold():
                continue
            value = " ".join(value.split())
            if value.casefold() not in allowed:
                raise Unreadable(f"{self.name} is {value!r:.40}, expected {self.demand}")
            given.add(allowed[value.casefold()])
        if len(given) != 1:
            problem = "no line gives" if not given else "two verdicts for"
            raise Unreadable(f"{problem} {self.name}, expected one line {self.demand}")
        return given.pop()


def yes_or_no(value: str) -> bool | None:
    """Return the boolean of a yes-or-no field, None for n/a."""
    return {"yes": True, "no": False}.get(value.casefold())


def label_odds(reply: Reply, labels: Sequence[str]) -> Mapping[str, float]:
    """Return the probability of each label, normalised over the labels.

    Raises:
        Unreadable: The reply has no log-probabilities, or the labels together have less than
            `MIN_LABEL_MASS` of the model's probability, so that another token was likely.
    """
    # an endpoint may send anything; rounding may put a log-probability a little above 0
    odds = [p for p in reply.logprobs if p <= 1e-3]
    if len(odds) != len(labels) or len(reply.logprobs) != len(labels):
        raise Unreadable(f"reply has {len(odds)} label odds, expected {len(labels)}, at most 0")
    masses = [math.exp(p) for p in reply.logprobs]
    total = sum(masses)
    if not total >= MIN_LABEL_MASS:
        raise Unreadable(f"labels {', '.join(labels)} have mass {total:.3f}, expected at least 0.9")
    return {label: mass / total for label, mass in zip(labels, masses, strict=True)}
