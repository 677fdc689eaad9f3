"""Self-reminder: two reminders to answer responsibly around the last user message.

The text is ours, with the message in place of ``{prompt}``.

Source: Xie et al. 2023, Nat. Mach. Intell. 5:1486 (unverified).
"""

from fastsafe.errors import UsageError

from ._spec import Defence
from ._system import Messages, read_text

_FIELD = "{prompt}"


def _apply(messages: Messages, *, text: str | None) -> list[dict[str, str]]:
    """Wrap the last user message.

    Raises:
        UsageError: The text has no ``{prompt}``, or no message is the user's.
    """
    words = read_text("self_reminder") if text is None else text
    if words.count(_FIELD) != 1:
        raise UsageError(f"self_reminder: text {words!r:.80} lacks {_FIELD}, expected it once")
    wrapped = [dict(message) for message in messages]
    user_turns = [message for message in wrapped if message["role"] == "user"]
    if not user_turns:
        raise UsageError("self_reminder: conversation has no user message, expected one to wrap")
    user_turns[-1]["content"] = words.replace(_FIELD, user_turns[-1]["content"])
    return wrapped


DEFENCE = Defence(
    id="self_reminder",
    stage="serve",
    acts_on="prompt",
    about="reminders to answer responsibly before and after the user's message",
    evidence="unverified; Xie et al. 2023, Nat. Mach. Intell. 5:1486",
    params={"text": None},  # None: texts/self_reminder.txt
    apply=_apply,
)
