"""What a format file declares: how one action is dressed as one task's input."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Translate = Callable[[str], str]


class Render(Protocol):
    """Turns an action phrase into the user message of a format."""

    def __call__(self, action: str, translate: Translate | None = None) -> str:
        """Return the user message; only a format in another language calls ``translate``."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to dress an action, harmful or benign, as a task's input."""

    id: str
    template: str  # the wording that `render` fills in
    render: Render

    @property
    def template_sha256(self) -> str:
        """Hash of the wording, in hex: completions of two wordings are never compared."""
        return hashlib.sha256(self.template.encode()).hexdigest()


def filled(id: str, template: str) -> Format:
    """Return the format whose template holds the action itself, at ``{action}``.

    Example:
        >>> filled("shout", "{action}!").render("paint the red car")
        'paint the red car!'
    """

    def render(action: str, translate: Translate | None = None) -> str:
        return template.replace("{action}", action)

    return Format(id=id, template=template, render=render)
