"""Self-reminder: the last user message between two reminders to answer responsibly.

The text is ours; ``{prompt}`` in it stands for the message.

Source: Xie et al. 2023, Nat. Mach. Intell. 5:1486 (unverified).
"""

from fastsafe.errors import UsageError

from ._spec import Defence
from ._system import Messages, read_text

_PLACE = "{prompt}"


def _apply(messages: Messages, *, text: str | None) -> list[dict[str, str]]:
    """Wrap the last user message.

    Raises:
        UsageError: The text has no place for it, or no message is the user's.
    """
    words = read_text("self_reminder") if text is None else text
    if words.count(_PLACE) != 1:
        raise UsageError(f"self_reminder: text {words!r:.80} lacks {_PLACE}, expected it once")
    found = [dict(message) for message in messages]
    asked = [message for message in found if message["role"] == "user"]
    if not asked:
        raise UsageError("self_reminder: conversation has no user message, expected one to wrap")
    asked[-1]["content"] = words.replace(_PLACE, asked[-1]["content"])
    return found


DEFENCE = Defence(
    id="self_reminder",
    stage="serve",
    acts_on="prompt",
    about="reminders to answer responsibly before and after the user's message",
    evidence="unverified; Xie et al. 2023, Nat. Mach. Intell. 5:1486",
    params={"text": None},  # None: texts/self_reminder.txt
    apply=_apply,
)
