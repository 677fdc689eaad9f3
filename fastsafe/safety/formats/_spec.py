"""What a format file declares: how one behaviour is dressed as one task's input."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fastsafe.errors import UsageError
from fastsafe.safety.behaviours import Behaviour, Form

Translate = Callable[[str], str]

# In a template, where the text goes: as it is, or in the language of the format.
AS_IS, FOREIGN = "{action}", "{foreign}"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to dress a behaviour, harmful or benign, as a task's input.

    The harmful text and its benign twin go through the same template: the wording around them
    never differs, and adds nothing to either.
    """

    id: str
    template: str  # around an action phrase, "paint the red car"
    request_template: str  # around a whole sentence, "Write a poem about a red car."

    def __post_init__(self) -> None:
        for template in (self.template, self.request_template):
            if template.count(AS_IS) + template.count(FOREIGN) != 1:
                raise UsageError(
                    f"format {self.id}: template is {template[:60]!r}, expected exactly one "
                    f"{AS_IS} or {FOREIGN} in it"
                )

    @property
    def template_sha256(self) -> str:
        """Hash of the wordings, in hex: completions of two wordings are never compared."""
        return hashlib.sha256(f"{self.template}\0{self.request_template}".encode()).hexdigest()

    @property
    def needs_translator(self) -> bool:
        """Whether the text appears in another language."""
        return FOREIGN in self.template

    def render(self, action: str, translate: Translate | None = None, form: Form = "action") -> str:
        """Return the user message for one text.

        Args:
            action: The text, of the form given.
            translate: Puts it into the format's language; called by such a format alone.
            form: What the text is: an action phrase, or a whole request.

        Raises:
            UsageError: The format needs a translator and has none.
        """
        if self.needs_translator:
            if translate is None:
                raise UsageError(
                    f"{self.id}: translate is None, expected a function into the format's "
                    "language; pass one or drop the format"
                )
            action = translate(action)
        template = self.template if form == "action" else self.request_template
        before, _, after = template.partition(FOREIGN if self.needs_translator else AS_IS)
        return f"{before}{action}{after}"

    def ask(self, behaviour: Behaviour, harmful: bool, translate: Translate | None = None) -> str:
        """Return the user message for a behaviour, or for its benign twin; errors as `render`."""
        return self.render(behaviour.action(harmful), translate, behaviour.form)


def filled(id: str, template: str, request_template: str = "") -> Format:
    """Return a format of these wordings; without a second one, both forms share the first.

    Example:
        >>> filled("shout", "{action}!").render("paint the red car")
        'paint the red car!'
    """
    return Format(id=id, template=template, request_template=request_template or template)
