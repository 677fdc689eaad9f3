"""The declaration of a format: the templates that render a behaviour as a task's input."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fastsafe.errors import UsageError
from fastsafe.safety.behaviours import Behaviour, Form

Translate = Callable[[str], str]

# Placeholders of a template: the text as it is, or translated into the format's language.
AS_IS, FOREIGN = "{action}", "{foreign}"


@dataclass(frozen=True, kw_only=True)
class Format:
    """Templates that render a behaviour, harmful or benign, as a task's input.

    The harmful text and its benign twin share a template: the wording around them never differs,
    and adds nothing harmful.
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
        """Hash of the templates, in hex: completions of different templates are never compared."""
        return hashlib.sha256(f"{self.template}\0{self.request_template}".encode()).hexdigest()

    @property
    def needs_translator(self) -> bool:
        """Whether the format's text is in another language."""
        return FOREIGN in self.template

    def render(self, action: str, translate: Translate | None = None, form: Form = "action") -> str:
        """Return the user message for one text.

        Args:
            action: The text.
            translate: Translates the text; called only by a format in another language.
            form: Form of the text: an action phrase, or a whole request.

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
    """Return a format of these templates; without a second one, both forms share the first.

    Example:
        >>> filled("shout", "{action}!").render("paint the red car")
        'paint the red car!'
    """
    return Format(id=id, template=template, request_template=request_template or template)
